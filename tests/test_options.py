"""fastres.options: an Input and the Options are right from the start, or refused."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from fastres.errors import InputError
from fastres.options import Input, Options

LOW, USUAL, HIGH = (1, 3, 160, 160), (8, 3, 224, 224), (32, 3, 320, 224)


class TestInput:
    def test_one_shape(self) -> None:
        image = Input((2, 3, 8, 8))
        assert image.smallest == image.usual == image.largest == (2, 3, 8, 8)
        assert image.ranged == ()

    def test_three_shapes(self) -> None:
        image = Input((LOW, USUAL, HIGH))
        assert (image.smallest, image.usual, image.largest) == (LOW, USUAL, HIGH)
        assert image.ranged == (2, 3)

    def test_the_batch_size_is_always_free(self) -> None:
        assert Input(((1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))).ranged == ()

    def test_one_of_height_and_width(self) -> None:
        assert Input(((1, 3, 8, 8), (1, 3, 8, 9), (1, 3, 8, 9))).ranged == (3,)

    @pytest.mark.parametrize(
        "shape",
        [[2, 3, 8, 8], torch.Size((2, 3, 8, 8)), tuple(np.array([2, 3, 8, 8])), [(2, 3, 8, 8)] * 3],
        ids=["list", "torch.Size", "numpy", "three alike"],
    )
    def test_every_way_to_say_the_same(self, shape: Any) -> None:
        image = Input(shape)
        assert image == Input((2, 3, 8, 8))
        assert hash(image) == hash(Input((2, 3, 8, 8)))
        assert all(type(size) is int for size in image.usual)

    def test_lists_of_lists(self) -> None:
        assert Input([list(LOW), list(USUAL), list(HIGH)]) == Input((LOW, USUAL, HIGH))  # type: ignore[arg-type]

    def test_dtype_and_name(self) -> None:
        image = Input((1, 10), dtype=torch.int64, name="mask")
        assert image.dtype == torch.int64 and image.name == "mask"
        assert Input((1, 10)) != image

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            (5, "shape 5 is neither one shape nor three"),
            (None, "neither one shape nor three"),
            ("2388", "neither one shape nor three"),
            (torch.zeros(2, 3), "neither one shape nor three"),
            ({1: 2}, "neither one shape nor three"),
            ((LOW, HIGH), "neither one shape nor three"),
            ((LOW, USUAL, 3), "neither one shape nor three"),
            ((LOW, USUAL, HIGH, HIGH), "neither one shape nor three"),
            ((), "rank 2 or more"),
            ((3,), "rank 2 or more"),
            (((), (), ()), "rank 2 or more"),
            ((LOW, USUAL, HIGH[:3]), "the same rank"),
            ((1, 3, 8.0, 8), "not an integer"),
            ((1, True, 8, 8), "not an integer"),
            ((1, None, 8, 8), "not an integer"),
            (("ab", "cd", "ef"), "not an integer"),
            ((LOW, USUAL, (32, 3, 320, 22.4)), "not an integer"),
            ((0, 3, 8, 8), "dimension 0 goes from 0 over 0 to 0"),
            ((1, 3, -8, 8), "dimension 2 goes from -8"),
            ((HIGH, USUAL, LOW), "dimension 0 goes from 32 over 8 to 1"),
            ((LOW, HIGH, USUAL), "it must be at least 1 and must not fall"),
            ((1, 3, 10**9, 10**9), "too large to run: an input may hold 1073741824 values"),
            ((1, 3, 2**15, 2**15), "too large to run"),
            (((1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 10**30, 8)), "no size may be above that"),
            (((1, 1, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8)), "dimension 1 is ranged; only N, H and W"),
        ],
        ids=repr,
    )
    def test_refuses_shapes(self, shape: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Input(shape)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"format": "NHWC"}, "format 'NHWC' is not supported; use 'NCHW'"),
            ({"dtype": "float32"}, "dtype is 'float32'; give a torch.dtype"),
            ({"dtype": float}, "give a torch.dtype"),
            ({"name": 3}, "name is 3; give a text"),
            ({"name": ""}, "name is ''; give a text"),
        ],
        ids=repr,
    )
    def test_refuses_settings(self, settings: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Input((1, 3, 8, 8), **settings)

    def test_a_large_batch_of_large_pictures(self) -> None:
        assert Input((4096, 3, 224, 224)).usual[0] == 4096
        assert Input(((1, 64, 1, 1), (1, 64, 224, 224), (1, 64, 8192, 8192))).ranged == (2, 3)

    def test_a_tensor_is_not_printed_whole(self) -> None:
        with pytest.raises(InputError) as caught:
            Input(torch.zeros(64, 64))  # type: ignore[arg-type]
        assert len(str(caught.value)) < 120 and "give (N, C, H, W)" in str(caught.value)

    def test_is_a_value_error_too(self) -> None:
        with pytest.raises(ValueError):
            Input((0, 0))


class TestOptions:
    def test_defaults(self) -> None:
        options = Options()
        assert options.backend == ("auto",) and options.precision is None
        assert options == Options() and hash(options) == hash(Options())

    def test_threads(self) -> None:
        assert Options(threads=3).num_threads == 3
        assert Options().num_threads == len(os.sched_getaffinity(0))

    def test_integers_of_numpy(self) -> None:
        options = Options(threads=np.int64(3), max_batch_size=np.uint8(4))  # type: ignore[arg-type]
        assert options == Options(threads=3, max_batch_size=4)
        assert type(options.threads) is type(options.max_batch_size) is int

    def test_a_list_of_backends(self) -> None:
        assert Options(backend=["cpu"]) == Options(backend=("cpu",))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"precision": "fp4"},
                "precision is 'fp4'; supported are None, 'fp32', 'tf32', 'fp16'",
            ),
            ({"precision": torch.float16}, "precision is torch.float16; supported are"),
            ({"hint": "speed"}, "hint is 'speed'; supported are 'latency', 'throughput'"),
            ({"hint": None}, "hint is None"),
            ({"oversize": "pad"}, "oversize is 'pad'; supported are 'split', 'error'"),
            ({"on_unsupported": "skip"}, "on_unsupported is 'skip'; supported are 'error', 'fall"),
            ({"max_batch_size": 0}, "max_batch_size is 0; it must be an integer of at least 1$"),
            ({"max_batch_size": 2.0}, "max_batch_size is 2.0"),
            ({"max_batch_size": True}, "max_batch_size is True"),
            ({"threads": -1}, "threads is -1"),
            ({"threads": "all"}, "threads is 'all'"),
            ({"threads": 10**30}, "threads is 10+; it must be at most 4096"),
            ({"threads": np.bool_(True)}, "an integer of at least 1"),
            ({"precision": np.array(["fp32", "bf16"])}, "precision is array"),
            ({"cache_size": 0}, "cache_size is 0; it must be an integer of at least 1$"),
            ({"cache_size": None}, "cache_size is None"),
            ({"backend": ()}, r"backend is \(\); give a name or a list of names"),
            ({"backend": "cpu"}, "backend is 'cpu'"),
            ({"backend": ("cpu", 3)}, "give a name or a list of names"),
            ({"backend": 5}, "backend is 5; give a name or a list of names"),
            ({"backend": None}, "backend is None; give a name or a list of names"),
        ],
        ids=repr,
    )
    def test_refuses(self, settings: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Options(**settings)
