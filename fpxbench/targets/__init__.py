"""Which GPU takes what, since when: kernels compiled for GPUs that need not be there, by any Triton from 3.0 on.

An *operation* (decode, encode, a dot of some kind) is made of *probes*: one small kernel with its format and options. A probe on an
*architecture* is a *cell*, and a cell has a history over Triton builds. `docs/targets.md` has the words and the schema.
"""
