"""How are many machines and builds measured by one command?

A driver (`driver`) holds the schedule and the store; on each device of a Ray cluster a worker (`device_worker`)
runs ``fpxbench run`` in a build's environment and keeps the records in a spool until the driver has stored them.
The two exchange JSON (`fleet_messages`).
"""
