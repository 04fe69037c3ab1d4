"""What a compiled program does, read from its text (`compiled.as_text()`): memory traffic,
operations of its convolutions and collectives, each by the `jax.named_scope` it comes from.

Bytes are those of main memory (HBM) as laid out, with the padding of tiles: an array in the on-chip
memory of a TPU (memory space other than 0) costs nothing, and the copy that brings it there is
counted. A fused operation is counted as reading its operands once and writing its results once.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+)(?: \(.*)? \{$")
_OPCODE = re.compile(r"^(\(?.*?[\]})]) ([a-z][a-z0-9-]*)\(")
_NO_TRAFFIC = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "copy-done",
    "slice-done",
    "optimization-barrier",
}
_CALLED = re.compile(
    r"\b(?:body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)"
)


@dataclass(frozen=True)
class Array:
    """An array of a program."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int
    """With the padding of its tiles."""
    in_main_memory: bool


@dataclass(frozen=True)
class Instruction:
    """One line of a program."""

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    """Names of instructions of the same computation."""
    attributes: str
    """The rest of the line."""

    @property
    def scope(self) -> str:
        """Where it comes from: scopes and primitive, as in "jit(step)/matching/max"; may be ""."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def attribute(self, pattern: str) -> str:
        """The first group of a regular expression in the attributes, or ""."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Cost:
    """What an instruction costs each time the program runs."""

    instruction: Instruction
    scope: str
    """That of the instruction, or of one that uses it."""
    times: int
    """How often it runs, by the trip counts of the loops around it."""
    bytes: int
    """Read from and written to main memory, all times together."""
    flops: int
    """Operations of its convolutions and matrix products, likewise: two per multiply-add."""


@dataclass(frozen=True)
class Program:
    """The computations of a compiled program; see `parse`."""

    computations: Mapping[str, dict[str, Instruction]]
    entry: str

    def costs(self) -> Iterator[Cost]:
        """The costs of what the program runs, in order; fused instructions count as one."""
        yield from self._costs(self.entry, 1)

    def _costs(self, computation: str, times: int) -> Iterator[Cost]:
        instructions = self.computations[computation]
        scopes = _scopes(instructions)
        for instruction in instructions.values():
            name = instruction.opcode
            if name in ("while", "conditional", "call"):
                trips = int(instruction.attribute(r"known_trip_count[^\d]*(\d+)") or 1)
                for called in self._called(instruction):
                    yield from self._costs(called, times * (trips if name == "while" else 1))
                continue
            traffic = 0 if name in _NO_TRAFFIC else _traffic(instruction, instructions)
            flops = self._flops(computation, instruction)
            if traffic or flops or name in COLLECTIVES:
                scope = scopes[instruction.name]
                yield Cost(instruction, scope, times, times * traffic, times * flops)

    def _called(self, instruction: Instruction) -> list[str]:
        names = _CALLED.findall(instruction.attributes)
        branches = instruction.attribute(r"branch_computations=\{([^}]*)\}")
        return [*names, *re.findall(r"[\w.-]+", branches)]

    def _flops(self, computation: str, instruction: Instruction) -> int:
        """Of the convolutions and dot products in an instruction or in what it fuses."""
        instructions = self.computations[computation]
        if instruction.opcode == "convolution":
            return _convolution_flops(instruction, instructions)
        if instruction.opcode == "dot":
            return _dot_flops(instruction, instructions)
        called = instruction.attribute(r"calls=%?([\w.-]+)")
        if instruction.opcode in ("fusion", "async-start") and called in self.computations:
            return sum(self._flops(called, inner) for inner in self.computations[called].values())
        return 0


def parse(text: str) -> Program:
    """Reads the text of a compiled program (HLO).

    Raises:
        ValueError: it has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            instruction = _instruction(found[1], found[2])
            if instruction is not None:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("not the text of a compiled program: it has no ENTRY computation")
    return Program(computations, entry)


def _instruction(name: str, definition: str) -> Instruction | None:
    found = _OPCODE.match(definition)
    if found is None:
        return None
    end = _closing(definition, found.end() - 1)
    inside = definition[found.end() : end]
    operands = tuple(re.findall(r"%([\w.-]+)", inside)) or tuple(
        word for word in re.split(r"[,\s]+", inside) if re.fullmatch(r"[a-zA-Z_][\w.-]*", word)
    )
    return Instruction(name, found[2], arrays(found[1]), operands, definition[end + 1 :])


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, such as `(f32[8,128]{1,0:T(8,128)}, s32[])`."""
    return tuple(_array(*found) for found in _ARRAY.findall(shape))


def _array(dtype: str, sizes: str, order: str, layout: str) -> Array:
    shape = tuple(int(size) for size in sizes.split(",") if size)
    bits = _BITS.get(dtype) or int("".join(re.findall(r"\d+", dtype)[:1]) or 0)
    padded = list(shape)
    tile = re.search(r"T\(([\d,]+)\)", layout)
    if tile and order:
        minor_first = [int(axis) for axis in order.split(",")]
        for axis, size in zip(minor_first, reversed(tile[1].split(",")), strict=False):
            padded[axis] = -(-padded[axis] // int(size)) * int(size)
    space = re.search(r"S\((\d+)\)", layout)
    return Array(dtype, shape, math.prod(padded) * bits // 8, not space or space[1] == "0")


def _scopes(instructions: dict[str, Instruction]) -> dict[str, str]:
    """The scope of each instruction; copies have none of their own and get that of their user."""
    scopes = {name: instruction.scope for name, instruction in instructions.items()}
    for name in reversed(instructions):  # users come after what they use
        for operand in instructions[name].operands:
            if not scopes.get(operand, "x"):
                scopes[operand] = scopes[name]
    return scopes


def _traffic(instruction: Instruction, instructions: Mapping[str, Instruction]) -> int:
    """Bytes of main memory that an instruction reads and writes."""
    results = instruction.results
    if instruction.opcode in ("copy-start", "slice-start"):  # (to, from, ...), or (from, to, ...)
        moved = min((array.bytes for array in results if array.shape), default=0)
        return moved * sum(array.in_main_memory for array in results if array.shape)
    read = [
        array
        for operand in instruction.operands
        if operand in instructions
        for array in instructions[operand].results
    ]
    if instruction.opcode in ("slice", "dynamic-slice", "gather"):  # only what comes out is read
        read = list(results)
    return sum(array.bytes for array in (*read, *results) if array.in_main_memory)


def _convolution_flops(instruction: Instruction, instructions: Mapping[str, Instruction]) -> int:
    """Two per multiply-add, without the products with padding, as XLA counts them."""
    image, kernel = (instructions[operand].results[0].shape for operand in instruction.operands)
    output = instruction.results[0].shape
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        return 0
    of_image, of_kernel, of_output = labels.groups()
    window = _window(instruction)
    products = 1
    for axis, label in enumerate(sorted(set(of_kernel) - set("io"))):
        products *= _valid_products(
            image[of_image.index(label)],
            kernel[of_kernel.index(label)],
            output[of_output.index(label)],
            {name: values[axis] for name, values in window.items() if values},
        )
    batch, features = output[of_output.index("b")], output[of_output.index("f")]
    return 2 * products * batch * features * kernel[of_kernel.index("i")]


def _window(instruction: Instruction) -> dict[str, list[str]]:
    text = instruction.attribute(r"window=\{([^}]*)\}")
    names = ("stride", "pad", "lhs_dilate", "rhs_dilate")
    found = {name: re.search(rf"\b{name}=(\S+)", text) for name in names}
    return {name: match[1].split("x") if match else [] for name, match in found.items()}


def _valid_products(image: int, kernel: int, output: int, window: Mapping[str, str]) -> int:
    """Pairs (output position, kernel position) of one axis that fall on an image value."""
    stride, dilate = int(window.get("stride", 1)), int(window.get("rhs_dilate", 1))
    spread = int(window.get("lhs_dilate", 1))
    low = int(window.get("pad", "0_0").split("_")[0])
    count = 0
    for k in range(kernel):
        first = k * dilate - low
        for o in range(output):
            place = first + o * stride
            count += 0 <= place <= (image - 1) * spread and place % spread == 0
    return count


def _dot_flops(instruction: Instruction, instructions: Mapping[str, Instruction]) -> int:
    left = instructions[instruction.operands[0]].results[0].shape
    axes = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    contracted = math.prod(left[int(axis)] for axis in axes.split(",") if axis)
    return 2 * math.prod(instruction.results[0].shape) * contracted
