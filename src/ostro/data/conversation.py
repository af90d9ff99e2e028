"""Conversations with images, from the forms in which the field stores them.

Tokens and labels are left to `conversation_tokens`, batches to `conversation_loader`. The idea: whatever the form, a
row becomes messages of text and image parts in order, and an image stays a reference until a batch needs it, so rows
can be checked and counted without reading a single picture.

| form | row | images |
|---|---|---|
| `messages` | `{"messages": [{"role", "content"}]}`, content a text or a list of parts | parts image, image_url |
| `sharegpt` | `{"conversations": [{"from", "value"}]}` of human, gpt, system | `<image>` in a text |

In both, a column `images` (or `image`) may hold the images; `<image>` in a text, or an image part without content, then
takes the next one, and none may be left. `kind` names the type of question, for evaluation by type.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ostro.data.conversation_options import ConversationSourceOptions
from ostro.data.images import ImageSource
from ostro.data.records import JsonLines, JsonList, Records, may_be_hub_name, open_hub, open_parquet
from ostro.errors import DataError

Role = Literal["system", "user", "assistant"]

IMAGE_PLACEHOLDER = "<image>"
"""Stands for the next image of the row, in a row that has a column of images."""

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""Role by the names that data sets use for it."""

# Column of the messages, and names of role and content in each of them.
_FORMS = {"messages": ("messages", "role", "content"), "sharegpt": ("conversations", "from", "value")}
_IMAGE_COLUMNS = ("images", "image")
# Where an image part may hold its image.
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")
_DEFAULT_SPLIT = "train"
# The smallest image files have about 70 bytes. A path has a dot before its suffix, which base64 has not.
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*")
# UTF-8 cannot hold one; the tokenizer would read it as another character without saying so.
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_PLACEHOLDER = re.compile(rf"\s*{IMAGE_PLACEHOLDER}\s*")


@dataclass(frozen=True)
class TextPart:
    """A piece of text; not empty."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """An image in its place among the texts."""

    image: ImageSource


Part = TextPart | ImagePart


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks; only users show images.
        parts: Texts and images in order.
    """

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """Its texts, joined."""
        return "".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def images(self) -> tuple[ImageSource, ...]:
        """Its images in order."""
        return tuple(part.image for part in self.parts if isinstance(part, ImagePart))


@dataclass(frozen=True)
class Conversation:
    """A row of a data set.

    Attributes:
        messages: At least one.
        kind: Type of question, where the row names one.
        where: File and row, the beginning of every error about it.
    """

    messages: tuple[Message, ...]
    kind: str | None
    where: str

    def split_reference(self) -> tuple[tuple[Message, ...], str]:
        """Splits at the last assistant turn, for evaluation.

        Returns:
            The messages before it, which are the prompt, and its text, which is the reference answer.

        Raises:
            DataError: When no assistant turn answers anything.
        """
        for index in range(len(self.messages) - 1, 0, -1):
            if self.messages[index].role == "assistant":
                return self.messages[:index], self.messages[index].text
        raise DataError(f"{self.where}: no assistant turn that answers a user; expected one, the reference answer")


class ConversationSource:
    """The conversations of a file or data set by number, read on demand."""

    def __init__(self, name: str, records: Records, form: str, image_folder: Path | None) -> None:
        """Wraps rows, and reads the first one so that wrong columns show at once.

        Args:
            name: For messages.
            records: The rows.
            form: `messages`, `sharegpt`, or `auto` to tell by the columns of each row.
            image_folder: Where relative image paths start; None where there is no such place.

        Raises:
            DataError: When the first row is wrong; indexing raises it for others.
        """
        self.name = name
        self._records, self._form, self._image_folder = records, form, image_folder
        self[0]

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self._records)

    def __getitem__(self, index: int) -> Conversation:
        """Conversation `index`, from 0, its images not read yet.

        Raises:
            DataError: When the row is wrong.
            IndexError: When there is no such row.
        """
        return read_conversation(
            self._records[index], self._records.where(index), form=self._form, image_folder=self._image_folder
        )

    def __iter__(self) -> Iterator[Conversation]:
        """All conversations in order."""
        return (self[index] for index in range(len(self)))


def open_conversations(sources: Sequence[ConversationSourceOptions]) -> tuple[ConversationSource, ...]:
    """Opens the sources of `data.train` in order.

    Raises:
        DataError: For a source that is not there or has wrong rows.
    """
    return tuple(open_conversation_source(source, f"data.train.{index}") for index, source in enumerate(sources))


def open_conversation_source(options: ConversationSourceOptions, key: str) -> ConversationSource:
    """Opens one source.

    Args:
        options: Where it is and what form it has.
        key: Its dotted recipe key, for errors.

    Raises:
        DataError: When it is not there, is empty, or its first row is wrong.
    """
    path = Path(options.path)
    if path.is_file() and (options.split or options.subset):
        which = "split" if options.split else "subset"
        raise DataError(f"{key}.{which}: {options.path} is a single file without one; leave {which} out")
    if not path.exists() and not may_be_hub_name(options.path):
        raise DataError(f"{key}.path: no such file or folder: {options.path}; give one, or a hub name owner/name")
    image_folder = Path(options.image_folder) if options.image_folder else None
    if image_folder is not None and not image_folder.is_dir():
        raise DataError(f"{key}.image_folder: no such folder: {image_folder}; give the folder of the images")
    records: Records
    if not path.is_file():
        records = open_hub(options.path, subset=options.subset, split=options.split or _DEFAULT_SPLIT)
        image_folder = image_folder or (path if path.is_dir() else None)
    else:
        image_folder = image_folder or path.parent
        if path.suffix == ".parquet":
            records = open_parquet([path], path)
        else:
            records = JsonList(path) if path.suffix == ".json" else JsonLines(path)
    return ConversationSource(options.path, records, options.format, image_folder)


def read_conversation(row: Any, where: str, *, form: str = "auto", image_folder: Path | None = None) -> Conversation:
    """Reads a row in any of the forms.

    Args:
        row: The row.
        where: File and row, for errors.
        form: `messages`, `sharegpt`, or `auto` to tell by the column.
        image_folder: Where relative image paths start; None refuses them.

    Raises:
        DataError: For a missing column, an unknown role or part, a message without content, images that are not as
            many as their placeholders, an image by URL, or one that cannot be decoded from base64.
    """
    return _RowReader(row, where, form, image_folder).read()


class _RowReader:
    """Reads one row, handing out the images of its column in order."""

    def __init__(self, row: Any, where: str, form: str, image_folder: Path | None) -> None:
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object, got {type(row).__name__}")
        self._row, self._where, self._image_folder = row, where, image_folder
        self._column, self._role_key, self._content_key = self._find_form(form)
        self._images = self._image_column()
        self._num_placeholders = 0

    def read(self) -> Conversation:
        """The conversation of the row."""
        entries = self._row[self._column]
        if not isinstance(entries, list) or not entries:
            raise DataError(
                f"{self._where}: {self._column} must be a list of at least one message, got {entries!r:.80}"
            )
        messages = tuple(self._message(entry, f"{self._column}[{index}]") for index, entry in enumerate(entries))
        if self._images is not None and self._num_placeholders != len(self._images):
            raise DataError(
                f"{self._where}: {self._num_placeholders} image placeholders for {len(self._images)} images; "
                f"expected as many {IMAGE_PLACEHOLDER} in the texts as there are images"
            )
        kind = self._row.get("kind")
        if kind is not None and not isinstance(kind, str):
            raise DataError(f"{self._where}: kind must be text, got {kind!r}")
        return Conversation(messages, kind, self._where)

    def _find_form(self, form: str) -> tuple[str, str, str]:
        names = tuple(_FORMS) if form == "auto" else (form,)
        columns = [_FORMS[name] for name in names if self._row.get(_FORMS[name][0]) is not None]
        if len(columns) != 1:
            expected = " or ".join(_FORMS[name][0] for name in names)
            raise DataError(
                f"{self._where}: expected a column {expected}{', one of them' if columns else ''}, "
                f"got {sorted(self._row)}"
            )
        return columns[0]

    def _image_column(self) -> list[ImageSource] | None:
        columns = [column for column in _IMAGE_COLUMNS if self._row.get(column) is not None]
        if len(columns) > 1:
            raise DataError(f"{self._where}: has both images and image, which mean the same; keep one")
        if not columns:
            # Here `<image>` is no word of a text: rows of this form write it for an image only.
            return [] if self._column == "conversations" else None
        images = self._row[columns[0]]
        return [self._image(image, columns[0]) for image in (images if isinstance(images, list) else [images])]

    def _message(self, entry: Any, place: str) -> Message:
        if not isinstance(entry, dict) or entry.get(self._role_key) is None:
            raise DataError(
                f"{self._where}: {place} must be an object with {self._role_key} and {self._content_key}, "
                f"got {entry!r:.80}"
            )
        name = entry[self._role_key]
        if not isinstance(name, str) or name not in ROLES:
            raise DataError(f"{self._where}: {place}.{self._role_key} must be one of {', '.join(ROLES)}, got {name!r}")
        content = entry.get(self._content_key)
        place = f"{place}.{self._content_key}"
        if isinstance(content, str):
            parts = self._text_parts(content, place)
        elif isinstance(content, list):
            parts = [part for index, item in enumerate(content) for part in self._part(item, f"{place}[{index}]")]
        else:
            raise DataError(f"{self._where}: {place} must be text or a list of parts, got {content!r:.80}")
        if not any(isinstance(part, ImagePart) or part.text.strip() for part in parts):
            raise DataError(f"{self._where}: {place} is empty; give it text or leave the row out")
        message = Message(ROLES[name], tuple(parts))
        if message.images and message.role != "user":
            raise DataError(f"{self._where}: {place} has an image, which only users may show; got role {name}")
        return message

    def _text_parts(self, text: Any, place: str) -> list[Part]:
        if not isinstance(text, str):
            raise DataError(f"{self._where}: {place} must be text, got {text!r:.80}")
        if lone := _LONE_SURROGATE.search(text):
            raise DataError(f"{self._where}: character {lone.start() + 1} of {place} is a lone surrogate; remove it")
        if self._images is None:
            return [TextPart(text)] if text else []
        first, *rest = _PLACEHOLDER.split(text)
        parts: list[Part] = [TextPart(first)] if first else []
        for piece in rest:
            parts += self._next_image()
            parts += [TextPart(piece)] if piece else []
        return parts

    def _part(self, part: Any, place: str) -> list[Part]:
        if isinstance(part, str):
            return self._text_parts(part, place)
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            return self._text_parts(part.get("text"), place)
        if kind not in ("image", "image_url"):
            raise DataError(f"{self._where}: {place}.type must be text, image or image_url, got {part!r:.80}")
        keys = [key for key in _IMAGE_KEYS if part.get(key) is not None]
        if len(keys) > 1:
            raise DataError(f"{self._where}: {place} has both {keys[0]} and {keys[1]}; keep one")
        if keys:
            return [ImagePart(self._image(part[keys[0]], f"{place}.{keys[0]}"))]
        if self._images is None:
            raise DataError(f"{self._where}: {place} has no image; give it one, or the row a column images")
        return self._next_image()

    def _next_image(self) -> list[Part]:
        """The next image of the row's column; none where there are too few, which `read` reports."""
        self._num_placeholders += 1
        images = (self._images or [])[self._num_placeholders - 1 : self._num_placeholders]
        return [ImagePart(image) for image in images]

    def _image(self, value: Any, place: str) -> ImageSource:
        """An image as a path, as bytes, as text that holds them, or as the objects `datasets` makes of it."""
        if isinstance(value, dict):
            held = [value[key] for key in ("url", "bytes", "path") if value.get(key) is not None]
            if not held:
                raise DataError(f"{self._where}: {place} must hold url, bytes or path, got {sorted(value)}")
            return self._image(held[0], place)
        if isinstance(value, (Image.Image, bytes)):
            return ImageSource(value, self._where)
        if not isinstance(value, str) or not value:
            raise DataError(f"{self._where}: {place} must be a path, base64 or bytes, got {value!r:.80}")
        if value.startswith(("http://", "https://")):
            raise DataError(f"{self._where}: {place} is {value:.80}; Ostro fetches no URLs, download it first")
        if value.startswith("data:") or place.endswith("base64") or _BASE64.fullmatch(value):
            return ImageSource(self._decode(value, place), self._where)
        path = Path(value.removeprefix("file://"))
        if self._image_folder is None and not path.is_absolute():
            raise DataError(
                f"{self._where}: {place} is the path {value}, which starts nowhere; set image_folder of the source"
            )
        return ImageSource(path if self._image_folder is None else self._image_folder / path, self._where)

    def _decode(self, value: str, place: str) -> bytes:
        header, _, payload = value.rpartition(",")
        if header and not header.endswith(";base64"):
            raise DataError(f"{self._where}: {place} is a data URL of {header[:40]!r}, expected one in base64")
        try:
            return base64.b64decode("".join(payload.split()), validate=True)
        except ValueError as error:
            raise DataError(f"{self._where}: {place} is not base64 ({error}); write the file's bytes again") from error
