"""In which order did the builds come out?

The timeline is a git repository that asv walks, one commit a build (docs/timeline.md). `fpxbench.builds.timeline.sync`
fills it from package indexes; it is imported separately, since asv and the benchmarks read no index.
"""

from fpxbench.builds.timeline.commit import CHANNELS, commit_hash, identity, tag_name
from fpxbench.builds.timeline.entry import Entry, Failure, IndexedBuild, Pins, Wheel, in_order
from fpxbench.builds.timeline.repository import Timeline, TimelineChanges, TimelineError

__all__ = [
    "CHANNELS", "TimelineChanges", "Entry", "Failure", "Pins", "IndexedBuild", "Timeline", "TimelineError", "Wheel",
    "commit_hash", "identity", "in_order", "tag_name",
]
