"""Let the code of this package count in torch's caches of compiled graphs.

What such a cache keeps of an op is what its gradient came to, by the code of that time; its key is
the graph, which names the op and no more. So a newer version would go on with the gradients of an
older one. The tag that torch adds to every key is public, and is set when a compiler first asks
what an op of ours returns, before it looks into a cache.
"""

import functools
import hashlib
from pathlib import Path


@functools.cache
def sources() -> tuple[str, ...]:
    """Return the paths of this package's modules."""
    return tuple(str(path) for path in sorted(Path(__file__).parent.glob("*.py")))


@functools.cache
def _tag() -> str:
    code = hashlib.sha256()
    for path in sources():
        code.update(Path(path).read_bytes())
    return f"pbfx-{code.hexdigest()[:16]}"


def tag_caches() -> None:
    """Add a tag for this package's code to the user's, if it is not there yet."""
    from torch.compiler import config

    if _tag() not in config.cache_key_tag:
        config.cache_key_tag = f"{config.cache_key_tag} {_tag()}".lstrip()
