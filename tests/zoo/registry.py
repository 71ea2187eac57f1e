"""Every member of the zoo."""

from __future__ import annotations

from zoo import (
    convnets,
    generative,
    graphs,
    language,
    mobile,
    patches,
    recurrent,
    vision,
)
from zoo.member import Member

_FILES = (convnets, mobile, vision, generative, patches, language, recurrent, graphs)

ZOO: dict[str, Member] = {member.name: member for file in _FILES for member in file.MEMBERS}
