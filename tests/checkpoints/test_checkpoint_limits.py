"""fastres.checkpoints.files: what a file asks for is counted before any of it is made."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastres
from fastres import models
from fastres.checkpoints.files import read_checkpoint
from fastres.errors import BuildError, InputError

MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before PyTorch 1.6


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(data)]) + data


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def group(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def listing(*parts: bytes) -> bytes:
    return b"](" + b"".join(parts) + b"e"


def call(name: str, *arguments: bytes) -> bytes:
    module, _, function = name.rpartition(".")
    return b"c" + f"{module}\n{function}\n".encode() + group(*arguments) + b"R"


def storage(count: int, key: str = "0", kind: str = "Float", behind: bytes = b"") -> bytes:
    named = f"ctorch\n{kind}Storage\n".encode()
    return group(text("storage"), named, text(key), text("cpu"), number(count), behind) + b"Q"


def tensor(
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    *,
    count: int = 16,
    offset: int = 0,
    behind: bytes = b"",
) -> bytes:
    shape, steps = group(*map(number, sizes)), group(*map(number, strides))
    hooks = call("collections.OrderedDict")
    held = storage(count, behind=behind)
    return call(
        "torch._utils._rebuild_tensor_v2", held, number(offset), shape, steps, b"\x89", hooks
    )


def table(entries: Mapping[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in entries.items()) + b"u"


def whole(content: bytes) -> bytes:
    return b"\x80\x02" + content + b"."


def zipped(content: bytes, parts: Mapping[str, bytes | int] | None = None) -> bytes:
    """As torch.save does it, but deflated; a part that is a number is so many MiB of zeros."""
    every: dict[str, bytes | int] = {"a/data.pkl": whole(content), "a/version": b"3\n"}
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (every | {"a/data/0": bytes(64)} | dict(parts or {})).items():
            with archive.open(name, "w") as part:
                for piece in [bytes(1 << 20)] * data if isinstance(data, int) else [data]:
                    part.write(piece)
    return made.getvalue()


def before_zips(content: bytes, storages: bytes, keys: tuple[str, ...] = ("0",)) -> bytes:
    first = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True}))
    return first + whole(content) + pickle.dumps(list(keys), 2) + storages


def safetensors(header: object, body: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + body


ONE = {text("a"): tensor((16,), (1,))}
TWICE = b"q\x00h\x00\x86"  # what is on top, in a pair with itself
NESTED = b")" + TWICE * 60  # 2**60 empty tuples, to whoever looks at each
MANY = listing(*[b"K\x01"] * 100_000)
AGAIN = b"q\x01(" + b"ctorch\nSize\nh\x01R" * 100_000 + b"t"


def a_tensor(*shape: Any, **more: Any) -> bytes:
    return zipped(table({text("a"): tensor(*shape, **more)}))


FORGED = {
    "longer than its storage": (a_tensor((17,), (1,)), "reaches beyond its storage of 64 bytes"),
    "beyond by its strides": (a_tensor((4,), (6,)), "reaches beyond its storage"),
    "beyond by its offset": (a_tensor((4,), (1,), offset=13), "reaches beyond its storage"),
    "a negative size": (a_tensor((-1,), (1,)), "a tensor with sizes that are none"),
    "strides of 0": (a_tensor((10**12,), (0,)), "its tensors take 4000000000000, where at most"),
    "sizes that overflow": (a_tensor((2**40, 2**40), (0, 0)), "its tensors take 48357032784585"),
    "a hundred dimensions": (a_tensor((1,) * 100, (0,) * 100), "sizes that are none"),
    "a storage that is not there": (
        a_tensor((16,), (1,), count=10**10),
        "the storage 0 of 40000000000 bytes is 64 bytes long",
    ),
    "two sizes of a storage": (
        zipped(listing(tensor((1,), (1,), count=16), tensor((1,), (1,), count=32))),
        "two sizes for one storage",
    ),
    "a quantised tensor, which is made empty": (
        zipped(
            call(
                "torch._utils._rebuild_qtensor",
                storage(64, kind="QInt8"),
                number(0),
                group(number(2**40)),
                group(number(0)),
                group(),
            )
        ),
        "its tensors take 1099511627776",
    ),
    "bytes without content": (
        zipped(call("builtins.bytearray", number(10**11))),
        "a call of built",
    ),
    "a tensor without a storage": (zipped(call("torch.Tensor", number(10**10))), "call of torch.T"),
    "a new tensor": (
        zipped(b"ctorch\nTensor\n" + group(number(10**10)) + b"\x81"),
        "a new torch.T",
    ),
    "a storage by its class": (
        zipped(call("torch.storage.UntypedStorage", number(10**10))),
        "a call of torch.storage.UntypedStorage",
    ),
    "a file in the file": (
        zipped(call("torch.storage._load_from_bytes", text("x"))),
        "a call of torch.storage._load_from_bytes",
    ),
    "a storage with other insides": (zipped(storage(16) + b"}b"), "changed after it was made"),
    "a key that takes for ever": (zipped(b"}" + NESTED + b"Ns"), "a key that is no name"),
    "a set that takes for ever": (zipped(call("builtins.set", listing(NESTED))), "is no name"),
    "keys that collide": (
        zipped(table({number(k * (2**61 - 1)): b"N" for k in range(1, 1000)})),
        "a key that is no name",
    ),
    "a codec that takes for ever": (
        zipped(call("_codecs.encode", text("x" * 10**5), text("punycode"))),
        "a call of _codecs.encode",
    ),
    "every element of a tensor": (
        zipped(call("builtins.set", tensor((8 * 10**6,), (0,)))),
        "a call of builtins.set",
    ),
    "one list for many calls": (zipped(MANY + AGAIN), "more than 1048576 steps"),
    "endless": (zipped(b"N" * 1_100_000), "more than 1048576 steps"),
    "too many tensors": (
        zipped(tensor((1,), (1,)) + b"q\x00" + table({number(k): b"h\x00" for k in range(12_001)})),
        "holds 12001 tensors, of which at most 12000",
    ),
    "a text without end": (zipped(b"X\xff\xff\xff\xffabc"), "is damaged"),
    "two pickles": (zipped(table(ONE), {"a/DATA.pkl": whole(b"}")}), "two of its parts"),
    "two folders": (zipped(table(ONE), {"b/data.pkl": whole(b"}")}), "in several folders"),
    "something behind": (zipped(table(ONE)) + b"PK", "does not end as a zip file does"),
    "something before": (b"PK\3\4" + bytes(96) + zipped(table(ONE)), "is not where its end says"),
    "zeros for a version": (zipped(table(ONE), {"a/byteorder": 256}), "byteorder takes 268435456"),
    "zeros that agree": (
        zipped(table({text("a"): tensor((2**26,), (1,), count=2**26)}), {"a/data/0": 256}),
        "its tensors take 268435456",
    ),
    "an old file with a storage that is not there": (
        before_zips(table({text("a"): tensor((16,), (1,), count=10**11, behind=b"N")}), bytes(72)),
        "its storages take 400000000008 bytes, which it does not have",
    ),
    "an old file with storages that nothing fills": (
        before_zips(table({text("a"): tensor((16,), (1,), behind=b"N")}), bytes(72), keys=()),
        "it has storages that are not filled",
    ),
    "an old file with one that is filled twice": (
        before_zips(
            table({text("a"): tensor((16,), (1,), behind=b"N")}), bytes(144), keys=("0", "0")
        ),
        "it has storages that are not filled, or others",
    ),
    "an endless old file": (before_zips(b"N" * 1_100_000, b""), "more than 1048576 steps"),
    "many names of safetensors": (
        safetensors(
            {f"{k}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for k in range(12_001)}
        ),
        "holds 12001 tensors",
    ),
    "a long header": (safetensors(b"{" + b" " * (1 << 24)), "has a header of 16777217"),
}


@pytest.mark.parametrize(("content", "said"), FORGED.values(), ids=FORGED)
def test_forged_files_are_refused_before_they_cost_anything(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(content)
    begun = time.process_time()
    with pytest.raises(BuildError, match="net.pth cannot be read as weights: it ") as caught:
        read_checkpoint(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert time.process_time() - begun < 5


def test_the_forger_can_write_sound_files(tmp_path: Path) -> None:
    path, sound = tmp_path / "net.pth", table(ONE)
    old = before_zips(
        table({text("a"): tensor((16,), (1,), behind=b"N")}), struct.pack("<q", 16) + bytes(64)
    )
    for content in (zipped(sound), old):
        path.write_bytes(content)
        assert read_checkpoint(path)["a"].tolist() == [0.0] * 16


def test_what_a_file_may_take_can_be_raised(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save({"a": torch.zeros(1).expand(10_000_000)}, path)
    with pytest.raises(BuildError, match="take 40000000, where at most 33554432 are taken: twice"):
        read_checkpoint(path)
    with pytest.raises(
        BuildError, match=r"at most 39999999 are taken\. If you trust it, pass max_b"
    ):
        read_checkpoint(path, 39_999_999)
    assert read_checkpoint(path, 40_000_000)["a"].shape == (10_000_000,)
    for wrong in (0, -1, 1.5, True, "1"):
        with pytest.raises(BuildError, match="max_bytes is .*; give an integer of at least 1"):
            read_checkpoint(path, wrong)  # type: ignore[arg-type]


def test_a_file_may_always_hold_what_it_holds(tmp_path: Path) -> None:
    """Ten million numbers are beyond the 32 MiB that any file may ask for, and are there."""
    kept = torch.arange(10_000_000, dtype=torch.float32)
    for zipped_ in (True, False):
        torch.save(
            {"a": kept, "b": kept[3:]}, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped_
        )
        assert torch.equal(read_checkpoint(tmp_path / "a.pth")["b"], kept[3:])


def state() -> dict[str, Tensor]:
    return dict(models.cifar_resnet(8, seed=0).state_dict())


def expanded(path: Path) -> None:
    """A network of 10 million channels in a file of 300 kB."""
    weights = state()
    weights["conv1.weight"] = torch.zeros(1).expand(10**7, 3, 3, 3)
    torch.save(weights, path)


def test_everything_that_reads_weights_counts(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    expanded(path)
    with pytest.raises(BuildError, match="its tensors take 1080"):
        fastres.build(path)
    with fastres.compile(fastres.build(state()), backend="reference") as engine:
        with pytest.raises(InputError, match=r"its tensors take 1080.*; nothing was changed"):
            engine.update_weights(path)
        torch.save(state(), path)
        with pytest.raises(InputError, match="where at most 1000 are taken"):
            engine.update_weights(path, max_bytes=1000)
        engine.update_weights(path, max_bytes=10**6)
    assert fastres.build(path, max_bytes=10**6).nodes


@pytest.mark.parametrize("name", ["x" * 10**6, "\x1b[31mred\nerror: none", "y " * 10**5])
def test_names_are_cut_and_printable(tmp_path: Path, name: str) -> None:
    content = {**state(), name: torch.zeros(1)}
    torch.save(content, tmp_path / "net.pth")
    for source in (content, tmp_path / "net.pth"):
        with pytest.raises(BuildError) as caught:
            fastres.build(source)
        said = str(caught.value)
        assert len(said) < 1500 and said.replace("\n", "x").isprintable() and "\n" not in said
    with fastres.compile(fastres.build(state()), backend="reference") as engine:
        with pytest.raises(InputError) as refused:
            engine.update_weights(content)
        assert len(str(refused.value)) < 1500 and "\x1b" not in str(refused.value)


def test_numbers_in_names_that_are_none() -> None:
    for name in (f"layer1.{'9' * 5000}.conv1.weight", f"fc.{'9' * 5000}.weight"):
        with pytest.raises(BuildError, match="it has at most 1024"):
            fastres.build({**state(), name: torch.zeros(2, 2)})


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net.pth")
    for path in (tmp_path / "net.pth", Path("/dev/zero")):
        with pytest.raises(BuildError, match="it is a pipe or a device, and no regular file"):
            read_checkpoint(path)
    with pytest.raises(BuildError, match=r"there is no file a\\x00b"):
        read_checkpoint("a\0b")


def test_tables_that_are_deep_and_wide() -> None:
    deep: Any = [{} for _ in range(10_000)]
    for _ in range(5000):
        deep = {"next": deep}
    with pytest.raises(BuildError, match="deep in each other: too many"):
        fastres.build(deep)
