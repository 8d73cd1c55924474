"""Writes docs/coverage.md from coverage.json and coverage_deployed.json in benchmarks/results.

With `--check` it only tells whether the page is up to date.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
DEPLOYED = RESULTS.with_name("coverage_deployed.json")
PAGE = ROOT / "docs" / "coverage.md"
KINDS = {
    "timm": "timm, as classifier",
    "timm-features": "timm, `features_only=True`",
    "timm-reparameterized": "timm, parallel branches merged",
    "timm-large": "timm, large networks (bit-identity, plan and removal only)",
    "smp": "SMP",
    "smp-aux": "SMP with a classification head",
}
INTRODUCTION = """# Which networks can be gated

What `retrofit` does to one network of every convolutional family of timm and to every combination
of SMP architecture and encoder family, with the default configuration and fresh weights. Of each
network the benchmark checks that open gates are bit-identical in evaluation, that a forward and
backward pass with random gates is finite and reaches every parameter, that `measure` agrees with
counts from outside the package, that a saved file gives the same network back, that the plan
lists every layer, and that `remove` undoes all of it. `benchmarks/coverage.py` says how the
networks were chosen.

*Gateable* is the share of the network's multiply-accumulates inside sites, *floor* the smallest
compute fraction it can reach, *surgery* the time that `retrofit` takes on one core. The last
column says what stays dense, heaviest first, with its share. [Deployment](#deployed) was tried on
a part of them: how many of how many give the masked network's outputs."""
DEPLOYMENT = """## Deployed

The deployed network against the gated one under the same masks: all open, half of it in patches,
a tenth of it at random; twice, for the second pass replays the first one. Outputs may be off by
1e-4 of the largest from the gated network's or from exact ones (float64), or three times as far
from those as the gated network is in float32, for that image or three that differ from it in the
last place: some fresh networks magnify rounding. What the kernels do not know runs as torch runs
it, densely: the share of the multiply-accumulates, where it is 1% or more."""
LEAST_BY_TORCH = 0.01


def page(results: dict[str, Any], deployed: dict[str, Any]) -> str:
    """Text of docs/coverage.md."""
    environments = results["environments"]
    versions = ", ".join(
        f"{name} {_either(e['packages'][name] for e in environments)}"
        for name, version in results["environment"]["packages"].items()
        if version
    )
    parts = [
        INTRODUCTION,
        f"Measured with {versions}, on {_either(e['cpu'] for e in environments)}.",
    ]
    parts += [summary(results, deployed)]
    for kind, title in KINDS.items():
        records = _of_kind(results, kind)
        if records:
            parts += [f"## {title}", matrix(records) if kind == "smp" else table(records)]
        refused = [name for name, record in records.items() if record["status"] == "not offered"]
        if refused and kind != "smp":
            parts.append(f"The library itself does not offer: {', '.join(refused)}.")
    parts += [DEPLOYMENT, deployment(deployed)]
    return "\n\n".join(parts) + "\n"


def _either(values: Iterable[str]) -> str:
    return " or ".join(sorted(set(values)))


def summary(results: dict[str, Any], deployed: dict[str, Any]) -> str:
    """How many networks pass every check, and medians, by kind and for CNNs alone."""
    lines = [
        "| networks | tried | pass all checks | median gateable | median floor | longest surgery "
        "| deployed alike |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, title in KINDS.items():
        records = _offered(_of_kind(results, kind))
        plain = {name: r for name, r in records.items() if not r.get("hybrid")}
        alike = _offered(_of_kind(deployed, kind))
        lines += _summary_rows(title, records, alike)
        if kind == "timm" and len(plain) < len(records):
            alike = {name: record for name, record in alike.items() if name in plain}
            lines += _summary_rows(f"{title}: without attention", plain, alike)
    return "\n".join(lines)


def _summary_rows(title: str, records: dict[str, Any], deployed: dict[str, Any]) -> list[str]:
    measured = [record for record in records.values() if "floor" in record]
    if not measured:
        return []
    good = sum(record["status"] == "ok" for record in records.values())
    share, floor = (
        statistics.median(r[key] for r in measured) for key in ("gateable_share", "floor")
    )
    longest = max(record.get("surgery_seconds", 0.0) for record in measured)
    alike = sum(record["status"] == "ok" for record in deployed.values())
    cells = [title, len(records), good, f"{share:.1%}", f"{floor:.3f}", f"{longest:.1f} s"]
    cells.append(f"{alike} of {len(deployed)}" if deployed else "")
    return ["| " + " | ".join(map(str, cells)) + " |"]


def deployment(results: dict[str, Any]) -> str:
    """Deployed networks that are not like the others."""
    offered = _offered(results["networks"])
    torch_version = results["environment"]["packages"]["torch"]
    processors = " and ".join(sorted({record["cpu"] for record in offered.values()}))
    lines = [
        f"Tried: {len(offered)} networks, with torch {torch_version}, on {processors}.\n",
        "| network | largest difference | by rounding | run by torch |",
        "|---|---:|---:|---:|",
    ]
    for name, r in sorted(offered.items()):
        rounded = f"{r['rounding']:.1e}" if r.get("rounding") else ""
        share = f"{r['by_torch']:.1%}" if r.get("by_torch", 0) >= LEAST_BY_TORCH else ""
        if r["status"] != "ok":
            error = " ".join(r.get("error", "").split())
            lines.append(f"| {name} | **{r['status']}**: {error} | {rounded} | {share} |")
        elif rounded or share:
            lines.append(f"| {name} | {r['difference']:.1e} | {rounded} | {share} |")
    return "\n".join(lines)


def table(records: dict[str, Any]) -> str:
    """One row per network that the library offers."""
    lines = [
        "| network | family | input | GMACs | gateable | floor | surgery | what stays dense |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, r in sorted(_offered(records).items()):
        cells = [name, r["family"], *_figures(r), _remarks(r)]
        lines.append("| " + " | ".join(cells).replace("\n", " ") + " |")
    return "\n".join(lines)


def matrix(records: dict[str, Any]) -> str:
    """Encoders against architectures: what is gateable, or why there is nothing."""
    pairs = [name.split("/") for name in records]
    architectures = sorted({architecture for architecture, _ in pairs})
    lines = [
        "Share that is gateable; a dash where SMP does not offer the combination at all.\n",
        f"| encoder | {' | '.join(architectures)} |",
        "|---|" + "---:|" * len(architectures),
    ]
    for encoder in dict.fromkeys(encoder for _, encoder in pairs):
        cells = [_cell(records.get(f"{a}/{encoder}")) for a in architectures]
        lines.append(f"| {encoder} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(record: dict[str, Any] | None) -> str:
    if record is None or record["status"] == "not offered":
        return "-"
    if record["status"] == "ok":
        return f"{record['gateable_share']:.0%}"
    return f"**{', '.join(record.get('failures') or [record['status']])}**"


def _figures(record: dict[str, Any]) -> list[str]:
    if "floor" not in record:
        return [""] * 5
    seconds = record.get("surgery_seconds")
    return [
        str(record["size"]),
        f"{record['total_macs'] / 1e9:.2f}",
        f"{record['gateable_share']:.1%}",
        f"{record['floor']:.3f}",
        "" if seconds is None else f"{seconds:.1f} s",
    ]


def _remarks(record: dict[str, Any]) -> str:
    """What went wrong, then the reasons for what stays dense."""
    error = record.get("error", "").partition(":")[0]
    parts = [f"**{record['status']}: {error}**"] if error else []
    parts += [f"**{check} fails**" for check in record.get("failures", {})]
    parts += [f"{share:.1%} {reason}" for reason, share in record.get("reasons", {}).items()]
    return "; ".join(parts).replace("|", "/")


def _of_kind(results: dict[str, Any], kind: str) -> dict[str, Any]:
    prefix = f"{kind}/"
    networks = results["networks"].items()
    return {name.removeprefix(prefix): r for name, r in networks if name.startswith(prefix)}


def _offered(records: dict[str, Any]) -> dict[str, Any]:
    return {name: r for name, r in records.items() if r["status"] != "not offered"}


def main() -> None:
    """Write the page, or check it."""
    text = page(*(json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS, DEPLOYED)))
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE.name} is not up to date: run make figures")


if __name__ == "__main__":
    main()
