"""The demo: does growing dendrites pay on real digits?

`pbfx demo` runs it: plain, sham and dendritic nets over paired seeds. The pieces, from the inside
out: `data`, `nets`, `recipes` say what is trained; `arms` says how; `study` trains; `statistics`
and `summary` say what came out; `table`, `plot`, `report` and `progress` show it; `command` is the
console's side. Outermost: only `pbfx.cli` imports this package.
"""
