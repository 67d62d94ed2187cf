"""Which GPU compiles what, since which Triton?

An *operation* (decode, encode, a dot of some kind) is made of *probes*: one small kernel with its format and options. A
probe on an *architecture* is a *cell*, and a cell has a history over Triton builds. `docs/targets.md` has the glossary
and the schema.
"""
