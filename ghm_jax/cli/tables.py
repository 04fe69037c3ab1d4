"""Results as lines of text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # these import JAX, which takes a second that `ghm-jax --help` need not wait for
    from ghm_jax.analysis.compiled import CompiledStep
    from ghm_jax.analysis.cost import Description
    from ghm_jax.analysis.data_preview import Inspection


def description_table(description: Description) -> str:
    """What a detector costs, one line per module."""
    height, width = description.padded_size
    lines = [
        f"image of {height} x {width} pixels (height x width), {description.num_classes} classes",
        "",
        f"{'':<12}{'parameters':>14}{'trained':>14}{'multiply-adds':>17}",
    ]
    for name, module in {**description.modules, "total": description.total}.items():
        giga = f"{module.multiply_adds / 1e9:.2f} G"
        lines.append(f"{name:<12}{module.parameters:>14,}{module.trained:>14,}{giga:>17}")
    return "\n".join(
        [
            *lines,
            "",
            f"{'operations / 2, counted by XLA':<34}{description.xla_flops / 2e9:>14,.2f} G",
            f"{'anchors':<34}{description.anchors:>14,}",
            f"{'examples (anchor, class)':<34}{description.examples:>14,}",
            f"{'memory of the parameters (float32)':<34}"
            f"{description.parameter_bytes / 2**20:>14,.1f} MiB",
        ]
    )


def compiled_table(step: CompiledStep) -> str:
    """What a compiled step needs on each chip of a slice."""
    height, width = step.padded_size
    memory = step.memory
    needs = {
        "arguments": memory.arguments,
        "outputs": memory.outputs,
        "temporaries": memory.temporaries,
        "code": memory.code,
        "together": memory.peak,
        "of": memory.chip,
    }
    lines = [
        f"{step.program} step ({step.wrapper}) for {step.topology}: {step.chips} chips, "
        f"{step.hosts} hosts; {step.batch_per_chip} images of {height} x {width} per chip",
        "",
        *(f"memory: {name:<14}{size / 2**20:>12,.0f} MiB" for name, size in needs.items()),
        f"{'fits' if memory.fits else 'DOES NOT FIT'}; estimated largest batch per chip: "
        f"{memory.largest_batch} images",
        "",
        f"{'per chip':<22}{'bytes':>12}{'FLOPs':>13}{'FLOPs/byte':>12}{'at least':>13}"
        f"{'copies':>8}{'of bytes':>13}",
    ]
    for name, part in {**step.parts, "step": step.total}.items():
        lines.append(
            f"{name:<22}{part.bytes / 1e6:>9,.1f} MB{part.flops / 1e9:>11,.1f} G"
            f"{part.flops / max(part.bytes, 1):>12,.1f}{1e3 * part.seconds:>10,.3f} ms"
            f"{part.copies:>8}{part.copied / 1e6:>10,.1f} MB"
        )
    lines += ["", f"{'collectives':<22}{'of':<22}{'count':>6}{'bytes':>14}"]
    for c in step.collectives:
        lines.append(f"{c.kind:<22}{c.scope:<22}{c.count:>6}{c.bytes / 1e6:>11,.3f} MB")
    bounds = ", ".join(f"{name} {1e3 * value:,.3f} ms" for name, value in step.seconds.items())
    return "\n".join(
        [
            *lines,
            "",
            f"lower bounds of the step, from published limits of the chip: {bounds}",
            f"images per second of the slice, at most: "
            f"{step.chips * step.batch_per_chip / step.bound:,.0f}",
            f"FLOPs counted by the compiler: {step.compiler_flops / 1e9:,.1f} G; "
            f"compiled in {step.compile_seconds:,.0f} s",
        ]
    )


def inspection_table(inspection: Inspection, classes: int = 20) -> str:
    """Statistics of training batches, with the `classes` most frequent classes."""
    from ghm_jax.analysis.data_preview import QUANTILES

    images, boxes = len(inspection.padding), len(inspection.labels)
    without = int((inspection.boxes_per_image == 0).sum())
    lines = [
        f"{images:,} images, {without:,} without boxes; {boxes:,} boxes, "
        f"{inspection.dropped:,} more dropped by data.max_boxes; "
        f"{inspection.crowds:,} crowd regions",
        "batches: " + ", ".join(f"{n} of {h}x{w}" for (h, w), n in inspection.shapes.items()),
        "",
        f"{'':<28}{'mean':>9}{'min':>9}{'5 %':>9}{'median':>9}{'95 %':>9}{'max':>9}",
    ]
    for name, values in inspection.rows.items():
        if len(values):
            figures = (values.mean(), *np.quantile(values, QUANTILES))
            lines.append(f"{name:<28}" + "".join(f"{x:>9.3g}" for x in figures))
    lines += ["", f"{'class':<28}{'boxes':>9}{'share':>9}"]
    counts: Mapping[str, int] = inspection.class_counts
    for name, count in list(counts.items())[:classes]:
        lines.append(f"{name:<28}{count:>9,}{count / max(boxes, 1):>9.1%}")
    rest = list(counts.values())[classes:]
    if rest:
        lines.append(
            f"{f'{len(rest)} more classes':<28}{sum(rest):>9,}{sum(rest) / max(boxes, 1):>9.1%}"
        )
    return "\n".join(lines)


def gradient_table(what: str, stats: Mapping[str, Any], name: Callable[[str], str]) -> str:
    """Shares of examples and gradient by difficulty.

    Args:
        what: the examples are.
        stats: of one loss, see `ghm_jax.analysis.gradient_stats.gradient_stats`.
        name: gives the display name of a loss.
    """
    groups = stats["difficulty"].values()
    rows = {f"examples: {what}": [group["examples"] for group in groups]}
    for loss in stats["gradient"]:
        label = f"gradient: {name(loss)}" + (" (this run)" if loss == stats["loss"] else "")
        rows[label] = [group["gradient"][loss] for group in groups]
    lines = [" " * 32 + "".join(f"{label:>10}" for label in stats["difficulty"])]
    for label, values in rows.items():
        lines.append(f"{label:<32}" + "".join(f"{100 * value:>8.2f} %" for value in values))
    return "\n".join(lines)
