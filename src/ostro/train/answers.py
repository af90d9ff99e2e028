"""How good a vision-language model's own answers are: exact match per kind of question, beside what the question alone
tells.

The answers themselves come from `inference.chat`, the loss from `vlm_loss`.
"""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ostro.data.conversation import Conversation, open_conversation_source
from ostro.data.conversation_options import ConversationSourceOptions
from ostro.inference.chat import Chat
from ostro.train.judges import Judges
from ostro.train.options import AnswerOptions
from ostro.train.vlm_loss import held_out_loss

EXACT_MATCH = "exact match"
_EVALUATION_TOKENS = 8192


@dataclass(frozen=True)
class AnswerReport:
    """What a model answered on a held-out set.

    Attributes:
        conversations: N conversations; the last turn of each is the reference.
        answers: N answers of the model.
        loss: Mean cross-entropy over the supervised tokens; None for a baseline.
    """

    conversations: tuple[Conversation, ...]
    answers: tuple[str, ...]
    loss: float | None = None

    @property
    def correct(self) -> list[bool]:
        """Whether each answer is the reference, up to case and white space."""
        pairs = zip(self.answers, self.conversations, strict=True)
        return [normalise(answer) == normalise(reference_of(conversation)) for answer, conversation in pairs]

    @property
    def metrics(self) -> dict[str, float]:
        """Share of exact matches, over all and per kind where the rows name kinds."""
        by_kind: dict[str, list[bool]] = defaultdict(list)
        for conversation, right in zip(self.conversations, self.correct, strict=True):
            by_kind[EXACT_MATCH].append(right)
            if conversation.kind is not None:
                by_kind[conversation.kind].append(right)
        names = [EXACT_MATCH, *sorted(by_kind.keys() - {EXACT_MATCH})]
        return {name: sum(by_kind[name]) / len(by_kind[name]) for name in names}

    def save(self, path: Path) -> None:
        """Writes a row per conversation: `where`, `kind`, `question`, `reference`, `answer`, `correct`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for conversation, answer, right in zip(self.conversations, self.answers, self.correct, strict=True):
                row = {
                    "where": conversation.where,
                    "kind": conversation.kind,
                    "question": question_of(conversation),
                    "reference": reference_of(conversation),
                    "answer": answer,
                    "correct": right,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def open_held_out(options: AnswerOptions, key: str) -> tuple[Conversation, ...]:
    """The conversations of a held-out set, or a fixed random draw of them in the order of the file.

    Args:
        options: Which file, and how many of it.
        key: Dotted key of the options, for errors.

    Raises:
        DataError: When the file or a row of it is wrong.
    """
    source = open_conversation_source(ConversationSourceOptions(path=options.path), key)
    rows: Iterable[int] = range(len(source))
    if options.max_samples is not None and options.max_samples < len(source):
        rows = sorted(random.Random(0).sample(range(len(source)), options.max_samples))
    return tuple(source[row] for row in rows)


def evaluate_answers(
    chat: Chat, conversations: Sequence[Conversation], options: AnswerOptions, judges: Judges
) -> AnswerReport:
    """Has the model give the last answer of every conversation, and scores the references by its loss.

    Args:
        chat: The model.
        conversations: At least one, each ending with an assistant turn.
        options: Length of an answer and how many are made at once.
        judges: Ranks that share the conversations; all get the whole report.

    Raises:
        DataError: When an image cannot be read or a conversation is too long.

    Distributed: a gather of answers, as `Ranks.agreed`, and the collectives of decoding and loss.
    """
    own, encoder = judges.data.share_of(conversations), chat.encoder
    with judges.ranks.agreed():
        pairs = [encoder.encode_held_out(conversation) for conversation in own]
        samples, prompts = [whole for whole, _ in pairs], [prompt for _, prompt in pairs]
    answers = chat.answer_prompts(prompts, max_new_tokens=options.max_new_tokens, batch_samples=options.batch_samples)
    loss = held_out_loss(chat.model, samples, encoder.image_tokens, judges, micro_batch_tokens=_EVALUATION_TOKENS)
    return AnswerReport(tuple(conversations), tuple(judges.data.gather_shares(answers)), loss)


def answer_by_question(training: Iterable[Conversation], held_out: Sequence[Conversation]) -> AnswerReport:
    """The yardstick that sees no image: the answer most often given to the same question in training.

    A question that training never asked gets the most frequent answer of all. Of equally frequent ones, the first in
    the alphabet counts.

    Args:
        training: Conversations with any number of turns.
        held_out: The set to answer.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for conversation in training:
        for asked, given in zip(conversation.messages[:-1], conversation.messages[1:], strict=True):
            if asked.role == "user" and given.role == "assistant":
                for question in (normalise(asked.text), ""):
                    counts[question][given.text.strip()] += 1
    best = {
        question: min(answers.items(), key=lambda item: (-item[1], item[0]))[0] for question, answers in counts.items()
    }
    answers = [best.get(normalise(question_of(conversation)), best.get("", "")) for conversation in held_out]
    return AnswerReport(tuple(held_out), tuple(answers))


def normalise(text: str) -> str:
    """Text as answers are compared: without regard to case and white space."""
    return " ".join(text.casefold().split())


def question_of(conversation: Conversation) -> str:
    """Text of the turn before the reference answer."""
    return conversation.split_reference()[0][-1].text.strip()


def reference_of(conversation: Conversation) -> str:
    """Text of the last assistant turn."""
    return conversation.split_reference()[1].strip()
