"""Drop what `torch.compile` has made of a module whose graph has changed, and nothing else.

Dynamo keeps compiled code with the code object that it compiled. A perforated module gets a new
code object with every graph, so Dynamo notices the change of one that was compiled itself, but not
of one inside a larger model: there it would go on with the old graph, without a word.

Each perforated module has a class of its own, whose identity Dynamo's guards check. So the entries
that contain the module are those with its class among their guards.
"""

from __future__ import annotations

import logging
import re
import sys
import weakref
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

# A guard on the class or the identity of an object; the numbers are `id`s.
_IDENTITY = re.compile(r"___check_(?:type|obj)_id\(.*?, (\d+)\)")
_identities: weakref.WeakKeyDictionary[Any, frozenset[int]] = weakref.WeakKeyDictionary()


def drop_compiled_code(*modules: nn.Module) -> None:
    """Let `torch.compile` look at whatever contains one of `modules` anew, at its next call.

    What was compiled of other models stays, and so does what does not contain the modules. Does
    nothing where Dynamo has not been imported.
    """
    if "torch._dynamo" not in sys.modules or not modules:
        return
    try:
        from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code
        from torch._dynamo import config
        from torch._dynamo.convert_frame import compile_lock, input_codes
        from torch._dynamo.guards import DeletedGuardManagerWrapper

        seen = list(input_codes.seen)
    except (ImportError, AttributeError) as error:
        logger.info("this torch hides its compiled code (%s): all of it is dropped", error)
        torch.compiler.reset()
        return
    gone = {id(module) for module in modules} | {id(type(module)) for module in modules}
    with compile_lock:
        for code in filter(None, (reference() for reference in seen)):
            entries = _debug_get_cache_entry_list(code)
            guards: list[Any] = [entry.guard_manager for entry in entries]
            dead = [g for g in guards if isinstance(g, DeletedGuardManagerWrapper)]
            stale = [g for g in guards if g not in dead and _identities_in(g) & gone]
            if not stale:
                continue
            # What can match no more still counts towards the limit of recompilations, so it has to
            # go in time, even where other models of the same class lose their code with it.
            alone = len(stale) + len(dead) == len(guards)
            if alone or len(guards) + 1 >= config.recompile_limit:
                reset_code(code)
                continue
            for guard in stale:
                reason = "the graph of a perforated module in it has changed"
                guard.extra_state.invalidate(guard.cache_entry, DeletedGuardManagerWrapper(reason))


def _identities_in(guard: Any) -> frozenset[int]:
    """Return the identities of the classes and objects that an entry is bound to."""
    found = _identities.get(guard)
    if found is None:
        # The whole tree: its `code_parts` leave out what was inlined.
        found = _identities[guard] = frozenset(map(int, _IDENTITY.findall(str(guard))))
    return found
