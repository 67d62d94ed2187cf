"""Which PyTorch builds are there: installed, on an index, on the timeline, in an environment?"""
