"""PyTorch's pickles without pickle: a small machine for the opcodes that build plain data, which calls nothing from a file.

A global is a name that has to be on a written list; each stands for a function of ours that makes inert data. Everything else,
opcode or name, is refused. Nothing is imported because a file says so.
"""

import codecs
import dataclasses
import pickletools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jdiff.convert.rows import ConversionError, refuse

MOST_OPCODES = 20_000_000
MOST_BYTES = 1 << 30
"""A pickle beyond either is no checkpoint's: tensors lie outside of it."""


class StateDict(dict):
    """A dict with the attributes that came along (`_metadata` of PyTorch's state dicts)."""

    attributes: dict[str, Any]

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.attributes = {}


class Namespace(StateDict):
    """argparse's, as its attributes."""


class Inert:
    """A class that a checkpoint mentions and that says nothing about weights: its name, no more."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


@dataclasses.dataclass(frozen=True)
class StorageType:
    """The class of a tensor's storage, which says its dtype."""

    dtype: np.dtype


STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "Float8_e4m3fnStorage": ml_dtypes.float8_e4m3fn,
    "Float8_e5m2Storage": ml_dtypes.float8_e5m2,
}
DTYPES = {
    "float32": np.float32, "float": np.float32, "float64": np.float64, "double": np.float64, "float16": np.float16,
    "half": np.float16, "bfloat16": ml_dtypes.bfloat16, "int64": np.int64, "long": np.int64, "int32": np.int32,
    "int": np.int32, "int16": np.int16, "int8": np.int8, "uint8": np.uint8, "bool": np.bool_,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2,
}  # fmt: skip


def _ordered(items: Any = ()) -> StateDict:
    if not isinstance(items, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in items):
        raise refuse("the pickle makes an OrderedDict of something that is no list of pairs")
    return StateDict(_unique(items))


def _unique(pairs: Sequence[Any], into: dict[Any, Any] | None = None) -> dict[Any, Any]:
    found = {} if into is None else into
    for key, value in pairs:
        # no tuples: hashing nested ones goes down Python's own stack
        if not isinstance(key, str | int | float | bytes | Inert | None):
            raise refuse(f"the pickle has a {type(key).__name__} for a key")
        if key in found:
            raise refuse(f"the pickle has the key {str(key)[:200]!r} twice")
        found[key] = value
    return found


def _encode(text: Any, encoding: Any) -> bytes:
    """How protocol 2 writes bytes."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise refuse("the pickle uses _codecs.encode for something else than bytes")
    return codecs.latin_1_encode(text)[0]


def _numpy_dtype(name: Any, *_: Any) -> Any:
    if not isinstance(name, str) or name.lstrip("<=|") not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "b1"):
        raise refuse("the pickle has a numpy.dtype that is no plain number's")
    return np.dtype(name)


def _numpy_scalar(dtype: Any, value: Any) -> Any:
    if not isinstance(dtype, np.dtype) or not isinstance(value, bytes) or len(value) != dtype.itemsize:
        raise refuse("the pickle has a numpy scalar that is not of its dtype's size")
    return np.frombuffer(value, dtype)[0].item()


def _set(items: Any = ()) -> tuple:
    if not isinstance(items, list | tuple):
        raise refuse("the pickle makes a set of something that is no list")
    return tuple(items)


class Call:
    """A name on the list: what it does when the pickle calls it. Only this module makes one."""

    def __init__(self, run: Callable[..., Any]):
        self.run = run


def _names(rebuild: Callable[..., Any]) -> dict[str, Any]:
    """The list. rebuild: (storage, offset, size, stride) -> array."""

    def tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        return rebuild(storage, offset, size, stride)

    def parameter(data: Any, *rest: Any) -> Any:
        return data

    plain: dict[str, Any] = {f"torch {name}": StorageType(np.dtype(dtype)) for name, dtype in STORAGES.items()}
    plain |= {f"torch {name}": np.dtype(dtype) for name, dtype in DTYPES.items()}
    return plain | {
        "collections OrderedDict": Call(_ordered),
        "torch._utils _rebuild_tensor": Call(tensor),
        "torch._utils _rebuild_tensor_v2": Call(tensor),
        "torch._utils _rebuild_parameter": Call(parameter),
        "torch._utils _rebuild_parameter_with_state": Call(parameter),
        "torch Size": Call(lambda items=(): tuple(items) if isinstance(items, list | tuple) else ()),
        "torch device": Call(lambda *args: Inert("device")),
        "torch.serialization _get_layout": Call(lambda *args: Inert("layout")),
        "argparse Namespace": Call(Namespace),
        "__builtin__ set": Call(_set),
        "builtins set": Call(_set),
        "_codecs encode": Call(_encode),
        "numpy dtype": Call(_numpy_dtype),
        "numpy.core.multiarray scalar": Call(_numpy_scalar),
        "numpy._core.multiarray scalar": Call(_numpy_scalar),
        "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint": Inert("ModelCheckpoint"),
    }


_PUSHED = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINSTRING", "SHORT_BINSTRING"),
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def load(data: bytes, storage: Callable[[Any], Any], rebuild: Callable[..., Any]) -> Any:
    """The object that a pickle of protocol 2 to 5 describes.

    storage: what a persistent id (a tuple) stands for. rebuild: (storage, offset, size, stride) -> array.
    ConversionError names the opcode or global that is not on the list, or says what is broken. Containers come back as dict,
    list and tuple; sets as tuples.
    """
    if len(data) > MOST_BYTES:
        raise refuse(f"a pickle of {len(data)} bytes is no checkpoint's")
    try:
        return _Machine(storage, _names(rebuild)).run(data)
    except ConversionError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error, AttributeError) as error:
        raise refuse(f"the pickle is broken: {type(error).__name__}: {str(error)[:200]}") from error


class _Machine:
    """The stack and memo of one pickle; a mark puts the stack aside, in `outer`, and starts another."""

    def __init__(self, storage: Callable[[Any], Any], names: dict[str, Any]):
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storage, self.names = storage, names

    def run(self, data: bytes) -> Any:
        for number, (opcode, arg, position) in enumerate(pickletools.genops(data)):
            if number > MOST_OPCODES:
                raise refuse("the pickle has too many opcodes")
            if opcode.name == "STOP":
                if len(self.stack) != 1 or self.outer or position != len(data) - 1:
                    raise refuse("the pickle does not end where it should")
                return self.stack[0]
            self.step(opcode.name, arg)
        raise refuse("the pickle has no end")

    def marked(self) -> list[Any]:
        """What was pushed after the last mark, which goes too."""
        items, self.stack = self.stack, self.outer.pop()
        return items

    def container(self, kind: type) -> Any:
        """The list or dict on top, which is about to grow."""
        top = self.stack[-1]
        if not isinstance(top, kind):
            raise refuse(f"the pickle adds items to a {type(top).__name__}")
        return top

    def name(self, module: Any, name: Any) -> Any:
        """What a global stands for."""
        key = f"{module} {name}"
        if not isinstance(module, str) or not isinstance(name, str) or key not in self.names:
            raise refuse(
                f"the pickle wants {str(module)[:80]}.{str(name)[:80]}, which is not on the list of harmless names"
            )
        return self.names[key]

    def step(self, op: str, arg: Any) -> None:
        """One opcode."""
        stack = self.stack
        if op in _PUSHED:
            stack.append(arg)
        elif op in _CONSTANTS:
            stack.append(_CONSTANTS[op])
        elif op in ("BINPUT", "LONG_BINPUT"):
            self.memo[arg] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg])
        elif op == "MARK":
            self.outer.append(stack)
            self.stack = []
        elif op in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[op]())
        elif op == "TUPLE":
            items = tuple(self.marked())
            self.stack.append(items)
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [self.stack.pop() for _ in range(int(op[-1]))]
            stack.append(tuple(reversed(items)))
        elif op == "APPEND":
            item = self.stack.pop()
            self.container(list).append(item)
        elif op == "APPENDS":
            items = self.marked()
            self.container(list).extend(items)
        elif op == "SETITEM":
            value, key = self.stack.pop(), self.stack.pop()
            _unique([(key, value)], self.container(dict))
        elif op == "SETITEMS":
            items = self.marked()
            _unique(list(zip(items[::2], items[1::2], strict=True)), self.container(dict))
        elif op == "GLOBAL":
            stack.append(self.name(*arg.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name, module = self.stack.pop(), self.stack.pop()
            stack.append(self.name(module, name))
        elif op in ("REDUCE", "NEWOBJ"):
            args, call = self.stack.pop(), self.stack.pop()
            if not isinstance(call, Call) or not isinstance(args, tuple):
                raise refuse(
                    f"the pickle calls a {type(call).__name__}, which is no name on the list of harmless calls"
                )
            stack.append(call.run(*args))
        elif op == "BUILD":
            state = self.stack.pop()
            self.build(stack[-1], state)
        elif op == "BINPERSID":
            stack.append(self.storage(self.stack.pop()))
        elif op not in ("PROTO", "FRAME"):
            raise refuse(f"the pickle uses the opcode {op}, which no checkpoint needs")

    def build(self, what: Any, state: Any) -> None:
        """Attributes for a state dict or a namespace; a dtype's state may only repeat that it is of this machine's order."""
        if isinstance(what, Namespace) and isinstance(state, dict):
            _unique(list(state.items()), what)
        elif isinstance(what, StateDict) and isinstance(state, dict):
            what.attributes.update(state)
        elif not (isinstance(what, np.dtype) and isinstance(state, tuple) and state[1:2] in (("<",), ("|",), ("=",))):
            raise refuse(f"the pickle sets the state of a {type(what).__name__}")
