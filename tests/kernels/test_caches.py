"""A cache on disk does not hold what an op's gradient was in another version of the code."""

import shutil

import pytest
import torch
from kernel_cases import BY_NAME, make_dendrites
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache
from torch.compiler import config

from pbfx_kernels import caches, dendrites

COMPILERS = shutil.which("c++") or shutil.which("g++")


@pytest.fixture(autouse=True)
def tagged_by_the_user():
    torch._dynamo.reset()
    with config.patch(cache_key_tag="mine"):
        yield
    torch._dynamo.reset()


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler")
def test_another_version_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    args = make_dendrites(BY_NAME["linear"], 2).args(torch.float32)

    def misses() -> int:
        torch._dynamo.reset()
        counters.clear()
        torch.compile(dendrites, fullgraph=True)(**args)[0].sum().backward()
        return counters["aot_autograd"]["autograd_cache_miss"]

    with fresh_inductor_cache():
        assert misses() == 1
        assert misses() == 0
        monkeypatch.setattr(caches, "_tag", lambda: "pbfx-of-another-version")
        assert misses() == 1


def test_the_tag_is_added_once_to_the_users() -> None:
    caches.tag_caches()
    caches.tag_caches()
    mine, tag = config.cache_key_tag.split()
    assert mine == "mine"
    assert tag.startswith("pbfx-")


def test_who_traces_no_op_keeps_the_tag() -> None:
    torch.compile(torch.sin, backend="aot_eager")(torch.ones(2))
    assert config.cache_key_tag == "mine"
