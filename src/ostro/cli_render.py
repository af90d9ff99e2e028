"""How the command line shows reports: plain lines on stdout. What they say is decided in the rooms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ostro.checkpoint.report import FolderReport
from ostro.retrieval.report import RetrievalReport
from ostro.train.table import metric_table

_MIB, _GIB = 2**20, 2**30


def show_reports(reports: Mapping[str, RetrievalReport]) -> None:
    """Print what was searched, then one line of metrics per system.

    Args:
        reports: Report of the same held-out set by system.
    """
    first = next(iter(reports.values()))
    print(f"{first.name}: {len(first.queries):,} queries, {first.num_documents:,} documents")
    rows = {system: {**report.metrics, "seconds": sum(report.seconds.values())} for system, report in reports.items()}
    print(metric_table(rows))


def show_folder(report: FolderReport) -> None:
    """Print what a weights folder holds, then its problems.

    Args:
        report: What `ostro.checkpoint.inspect.inspect_folder` found.
    """
    rows = list(_folder_rows(report))
    width = max(len(label) for label, _ in rows)
    for label, value in rows:
        print(f"{label:<{width}}  {value}")
    for problem in report.problems:
        print(f"problem: {problem}")


def _folder_rows(report: FolderReport) -> Iterator[tuple[str, str]]:
    yield "folder", str(report.folder)
    text = "" if report.text_model_type == report.model_type else f", text {report.text_model_type}"
    yield "model", f"{report.model_type}{text} ({', '.join(report.architectures) or 'no architectures'})"
    yield "layout", report.layout or "not recognised"
    for part, count in report.num_parameters.items():
        yield f"{part} parameters", f"{count:,}"
    for dtype, count in report.num_tensors.items():
        yield dtype, f"{count} tensors, {report.num_bytes[dtype] / _MIB:,.1f} MiB"
    yield "files", str(report.num_files)
    memory = report.memory
    needs = {
        "frozen, BF16": memory.bfloat16_bytes,
        "frozen, FP8 as stored": memory.fp8_bytes,
        "all trained with float32 masters": memory.bfloat16_bytes + memory.full_float32_bytes,
    }
    shown = (f"{name} {_size(num_bytes)}" for name, num_bytes in needs.items())
    yield "memory", f"{'; '.join(shown)}; over all ranks, before activations"
    fp8 = report.fp8
    if fp8.num_weights:
        scales = f"{fp8.num_scales} scales ({', '.join(fp8.scale_dtypes) or 'none'})"
        yield "fp8", f"{fp8.num_weights} weights, {scales}, quant_method {report.quantization or 'not set'}"
    stored = "stored" if report.head_stored else "not stored"
    yield "head", f"{'tied to the embedding' if report.tied_in_config else 'its own'}, {stored}"
    yield "attention", "causal" if report.is_causal else "bidirectional"
    if report.pooling is not None:
        yield "pooling", report.pooling
    rope = report.rope
    named = {
        "theta": rope.theta,
        "factor": rope.factor,
        "original": rope.original_tokens,
        "attention scaling": rope.attention_scaling,
        "llama 4 beta": rope.llama_4_scaling_beta,
    }
    yield "rope", ", ".join([rope.kind, *(f"{name} {value:g}" for name, value in named.items() if value is not None)])
    yield "max tokens", "not set" if rope.max_tokens is None else f"{rope.max_tokens:,}"
    yield "vocabulary", "not set" if report.vocab_size is None else f"{report.vocab_size:,}"
    tokenizer = report.tokenizer
    ids = "" if tokenizer.vocab_size is None else f", {tokenizer.vocab_size:,} ids"
    yield "tokenizer", f"{', '.join(tokenizer.files) or 'none'}{ids}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:,.1f} GiB" if num_bytes >= _GIB else f"{num_bytes / _MIB:,.1f} MiB"
