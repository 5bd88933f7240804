"""A pickle interpreter that can only build inert values: a closed list of opcodes, and globals from a table of ours.

A pickle is a program. The standard loader lets it import and call anything, and set attributes of what it got. Here a
global that is not in the table is refused by name; one that is in it stands for a function of ours that the file may
call, and nothing else: no class, attribute or import is within reach. `pickle.Unpickler` with its own `find_class` and
`torch.load(weights_only=True)` are not used, because a deeply nested tuple as a key makes either overflow the C stack.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ect.errors import UserError

_LITERALS = {
    "INT", "LONG", "FLOAT", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING", "BININT", "BININT1", "BININT2", "LONG1",
    "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], object]] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
# Integers that differ by a multiple of 2^61 - 1 have one hash, and long texts take long to compare: a dictionary of either
# would take its square in time.
_KEY_BITS, _KEY_LENGTH = 32, 1024
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


# Modules of values that people do pickle; a file that asks for others may be hostile.
_INERT = {"argparse", "collections", "copy_reg", "copyreg", "datetime", "easydict", "numpy", "pathlib", "torch"}
_WARNING = "do not open this file with other programs unless you trust its source"


class UnsafePickle(UserError, pickle.UnpicklingError):
    """The file asks for something outside the closed list, or is damaged. Nothing in it was executed."""


@dataclass
class Budget:
    """The work that one file may ask of us in all, nested pickles included, so that a small file cannot ask for much."""

    work: int
    """Bytes (64 for an item of a list) handed to functions of the table."""
    opcodes: int = 1 << 20
    """A CIFAR-10 snapshot has about 70,000."""

    def step(self) -> None:
        self.opcodes -= 1
        if self.opcodes < 0:
            raise UnsafePickle("has more instructions than any known snapshot")

    def spend(self, args: Sequence[object]) -> None:
        self.work -= sum(len(arg) for arg in args if isinstance(arg, str | bytes))
        self.work -= sum(64 * len(arg) for arg in args if isinstance(arg, list | tuple))
        if self.work < 0:
            raise UnsafePickle("uses its data over and over, to fill the memory")


class Built:
    """Base of the table's values that a file may give a state (BUILD), which they merely keep."""

    state: Any = None


class Dictionary(dict[Any, Any], Built):
    """A dictionary that a file may give a state, as torch does to that of a network's weights."""


@dataclass(frozen=True, eq=False)
class Global:
    """A name of the table. Files hold and call it; nothing else can be done with it."""

    name: str
    call: Callable[..., object] | None


@dataclass(eq=False)
class Machine:
    """One run of the interpreter.

    Args: table: the globals by full name ("module.name"), each answered by a function, or None for what a file may
    mention but not call. budget: shared by all machines at work on one file. persistent: answers persistent ids; None
    refuses them. kind: what the file should be, for messages.
    """

    table: Mapping[str, Callable[..., object] | None]
    budget: Budget
    persistent: Callable[[Any], object] | None = None
    kind: str = "snapshot"
    _stack: list[Any] = field(default_factory=list)
    _below: list[list[Any]] = field(default_factory=list)  # the stack up to each open mark
    _memo: dict[Any, Any] = field(default_factory=dict)

    def run(self, file: io.BytesIO) -> Any:
        """Return the value of the pickle that starts at the position of `file`; leave the position just behind it.

        Lists and dictionaries in it may refer to each other in cycles. Raises UnsafePickle on anything outside the
        closed lists, and many other exceptions on a damaged file.
        """
        for opcode, arg, _ in pickletools.genops(file):
            self.budget.step()
            if opcode.name != "STOP":
                self._step(opcode.name, arg)
        return self._stack.pop()

    def _step(self, op: str, arg: Any) -> None:
        stack = self._stack
        if op in _LITERALS:
            stack.append(arg)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            stack.append(_EMPTY[op]())
        elif op in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[op])]
            stack.append(tuple(reversed(items)))
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[_key(arg)] = stack[-1]
        elif op == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[arg])
        elif op == "MARK":
            self._below.append(stack)
            self._stack = []
        elif op in ("TUPLE", "LIST", "DICT", "FROZENSET", "APPENDS", "ADDITEMS", "SETITEMS", "POP_MARK"):
            self._stack = self._below.pop()
            self._close_mark(op, stack)
        elif op not in ("PROTO", "FRAME"):
            self._operate(op, arg)

    def _close_mark(self, op: str, items: list[Any]) -> None:
        if op == "TUPLE":
            self._stack.append(tuple(items))
        elif op == "LIST":
            self._stack.append(items)
        elif op == "DICT":
            self._stack.append({})
            self._set_items(op, items)
        elif op == "FROZENSET":
            self._stack.append(make_set(items))
        elif op == "APPENDS":
            self._top(list, op).extend(items)
        elif op == "ADDITEMS":
            self._top(set, op).update(make_set(items))
        elif op == "SETITEMS":
            self._set_items(op, items)

    def _operate(self, op: str, arg: Any) -> None:
        stack = self._stack
        if op == "POP":
            stack.pop()
        elif op == "APPEND":
            item = stack.pop()
            self._top(list, op).append(item)
        elif op == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._set_items(op, [key, value])
        elif op == "GLOBAL":
            stack.append(self._global(*arg.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(self._global(module, name))
        elif op in ("REDUCE", "NEWOBJ"):
            args, function = stack.pop(), stack.pop()
            stack.append(self._call(function, args))
        elif op == "BUILD":
            state = stack.pop()
            if not isinstance(stack[-1], Built):
                raise UnsafePickle(f"sets the state (BUILD) of {describe(stack[-1])}")
            stack[-1].state = state
        elif op == "BINPERSID" and self.persistent is not None:
            stack.append(self.persistent(stack.pop()))
        else:
            what = f"{op} {show(arg)}" if type(arg) is str else op
            raise UnsafePickle(f"uses the pickle instruction {what}, which no {self.kind} needs")

    def _global(self, module: object, name: object) -> Global:
        if type(module) is not str or type(name) is not str:
            raise UnsafePickle(f"asks for a global named by {describe(module)} and {describe(name)}")
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"  # protocol 2 keeps the name of Python 2
        if full not in self.table:
            inert = module.split(".")[0] in _INERT
            what = f"it is another file than a {self.kind}" if inert else _WARNING
            raise UnsafePickle(f"asks for {show(full)}, which no {self.kind} needs. Nothing was executed; {what}")
        return Global(full, self.table[full])

    def _call(self, function: Any, args: Any) -> object:
        if type(function) is not Global or function.call is None or type(args) is not tuple:
            raise UnsafePickle(f"calls {describe(function)}, which is no function of a {self.kind}")
        try:
            self.budget.spend(args)
            return function.call(*args)
        except UnsafePickle as error:
            raise UnsafePickle(f"{function.name}: {error}") from error.__cause__
        except Exception as error:
            raise UnsafePickle(f"calls {function.name} with arguments that do not fit ({show(str(error))})") from error

    def _top(self, kind: type, op: str) -> Any:
        if not isinstance(self._stack[-1], kind):
            raise UnsafePickle(f"adds items ({op}) to {describe(self._stack[-1])}")
        return self._stack[-1]

    def _set_items(self, op: str, items: list[Any]) -> None:
        target = self._top(dict, op)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value


def make_set(items: object = ()) -> set[Any]:
    """Return a set of texts, bytes and integers."""
    return {_key(item) for item in sequence(items)}


def _key(key: Any) -> Any:
    if type(key) not in (str, bytes, int):  # hashing anything nested may overflow the C stack
        raise UnsafePickle(f"uses {describe(key)} as a key")
    if key.bit_length() > _KEY_BITS if type(key) is int else len(key) > _KEY_LENGTH:
        raise UnsafePickle("uses a key that is larger than any known file needs")
    return key


def sequence(value: object) -> Sequence[Any]:
    """Return `value`, if it is a list or a tuple; else raise UnsafePickle."""
    if not isinstance(value, list | tuple):
        raise UnsafePickle(f"has {describe(value)} where a list is expected")
    return value


def describe(value: object) -> str:
    """Name the kind of a value, for a message; never its content, which may be nested without end."""
    return (
        f"the global {show(value.name)}"
        if type(value) is Global
        else f"a value of type {type(value).__name__.lstrip('_')}"
    )


def show(text: str) -> str:
    """Return text from the file, for a message: short, printable, on one line."""
    text = text[:160]
    return text if text.isascii() and text.isprintable() else ascii(text)
