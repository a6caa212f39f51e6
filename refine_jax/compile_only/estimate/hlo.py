"""The text of an optimized HLO module as instructions, and how often its loops run.

The format is that of `compiled.as_text()` and of XLA's dumps; it is the same for all backends but
for layouts, memory spaces and what backends write into `backend_config`.
"""

import dataclasses
import functools
import math
import re

_BITS = {"pred": 8, "c64": 64, "c128": 128, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAMES = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (.*)", re.S)
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{\s*$")
_CALLEES = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|called_computations|"
    r"true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result; `space` 0 is the device's main memory."""

    dtype: str
    shape: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        """Size without padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            digits = re.search(r"\d+", self.dtype)
            bits = int(digits[0]) if digits else 0
        return math.prod(self.shape) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation. attributes: all that follows the operands."""

    name: str
    opcode: str
    result: str
    inside: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, one or those of a tuple."""
        arrays = []
        for dtype, dims, layout in _ARRAY.findall(self.result):
            shape = tuple(int(d.strip("<=")) for d in dims.split(",") if d)
            space = _SPACE.search(layout)
            arrays.append(Array(dtype, shape, int(space[1]) if space else 0))
        return tuple(arrays)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands."""
        return tuple(_NAMES.findall(self.inside))

    @functools.cached_property
    def callees(self) -> tuple[str, ...]:
        """Names of the computations that it calls."""
        return tuple(
            n for group in _CALLEES.findall(self.attributes) for n in _NAMES.findall(group)
        )

    def callee(self, role: str) -> str:
        """Name the computation in one role: body, condition, calls."""
        return re.search(rf"\b{role}=%([\w.\-]+)", self.attributes)[1]

    @property
    def source(self) -> str:
        """Where in the program it comes from: `jit(f)/layers/dot_general`; may be empty."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1].replace("\\'", "'") if match else ""


@dataclasses.dataclass
class Computation:
    """Instructions by name, in the order in which they run where the module is scheduled."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose value is that of the computation."""
        return next(i for i in self.instructions.values() if i.is_root)

    def parameter(self, index: int) -> Instruction:
        """Find parameter number `index`."""
        return next(
            i
            for i in self.instructions.values()
            if i.opcode == "parameter" and i.inside.strip() == str(index)
        )

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Find the instructions that read each value."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                users.setdefault(name, []).append(instruction)
        return users


@dataclasses.dataclass
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: str

    def trips(self, loop: Instruction, within: Computation) -> int | None:
        """Count how often a `while` of the computation `within` runs its body; None: not said.

        For loops that may end early it is the most that they run.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.callee("condition")]
        body = self.computations[loop.callee("body")]
        initial = within.instructions.get(loop.operands[0])
        trips = []
        for index, limit, closed in self._limits(condition, condition.root, within, initial, {}):
            start = _element(within, initial, index)
            step = _step(body, index)
            start = 0 if start is None else start
            trips.append(max(-(-(limit + closed - start) // step), 0))
        return min(trips, default=None)

    def _limits(self, condition, test, within, initial, bound):
        """Read the tests that must all hold: (element of the carry, limit, 1 if included)."""
        if test.opcode == "and":
            for name in test.operands:
                yield from self._limits(
                    condition, condition.instructions[name], within, initial, bound
                )
        elif test.opcode == "fusion":
            inner = self.computations[test.callee("calls")]
            values = {
                inner.parameter(i).name: (condition, condition.instructions[name], bound)
                for i, name in enumerate(test.operands)
            }
            yield from self._limits(inner, inner.root, within, initial, values)
        elif test.opcode in _SAME:
            yield from self._limits(
                condition, condition.instructions[test.operands[0]], within, initial, bound
            )
        elif test.opcode == "compare":
            direction = re.search(r"direction=(\w+)", test.attributes)[1]
            left, right = (
                _carried(condition, condition.instructions[x], bound) for x in test.operands
            )
            if direction in ("GT", "GE"):
                left, right = right, left
            if direction not in ("LT", "LE", "GT", "GE") or not isinstance(left, tuple):
                return
            limit = _element(within, initial, right[0]) if isinstance(right, tuple) else right
            if limit is not None:
                yield left[0], limit, direction in ("LE", "GE")


_SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "optimization-barrier")


def _carried(computation, instruction, bound):
    """An int, (element of the loop's carry,), or None."""
    while instruction.opcode in _SAME:
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.name in bound:
        return _carried(*bound[instruction.name])
    if instruction.opcode == "constant":
        return int(instruction.inside) if re.fullmatch(r"-?\d+", instruction.inside) else None
    if instruction.opcode == "get-tuple-element":
        return (int(re.search(r"index=(\d+)", instruction.attributes)[1]),)
    return None


def _element(computation, carry, index) -> int | None:
    """Look up the number that element `index` of a tuple is, if it is a constant."""
    if carry is None or carry.opcode != "tuple":
        return None
    value = computation.instructions[carry.operands[index]]
    while value.opcode in (*_SAME, "copy-start"):
        value = computation.instructions[value.operands[0]]
    whole = value.opcode == "constant" and re.fullmatch(r"-?\d+", value.inside)
    return int(value.inside) if whole else None


def _step(body, index) -> int:
    """Find the number that a loop's body adds to element `index` of its carry."""
    if body.root.opcode != "tuple":
        return 1
    value = body.instructions[body.root.operands[index]]
    while value.opcode in _SAME:
        value = body.instructions[value.operands[0]]
    if value.opcode != "add":
        return 1
    for name in value.operands:
        step = _carried(body, body.instructions[name], {})
        if isinstance(step, int) and step > 0:
            return step
    return 1


def parse(text: str) -> Module:
    """Parse the module of an HLO text."""
    computations, entry, current, lines = {}, "", None, []

    def finish():
        if current is not None and lines:
            instruction = _instruction("".join(lines))
            current.instructions[instruction.name] = instruction
        lines.clear()

    for line in text.splitlines(keepends=True):
        if current is None:
            if match := _COMPUTATION.match(line):
                current = computations[match[2]] = Computation(match[2], {})
                entry = match[2] if match[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):  # an attribute's end, that
            finish()
            current = None
        elif _INSTRUCTION.match(line):
            finish()
            lines.append(line)
        elif lines:  # some attributes go on for several lines
            lines.append(line)
    return Module(computations, entry)


def _instruction(text: str) -> Instruction:
    root, name, rest = _INSTRUCTION.match(text).groups()
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].strip()
    opcode = rest[: rest.index("(")]
    end = _closing(rest, len(opcode))
    inside = rest[len(opcode) + 1 : end - 1]
    return Instruction(name, opcode, result, inside, rest[end:], bool(root))


def _closing(text: str, start: int = 0) -> int:
    """Find the index after the parenthesis that closes the one at `start`."""
    depth, quoted = 0, False
    for index in range(start, len(text)):
        letter = text[index]
        quoted ^= letter == '"' and text[index - 1] != "\\"
        if quoted:
            continue
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return index + 1
    raise ValueError(f"An instruction of the HLO text does not end. Got: {text[:200]}")
