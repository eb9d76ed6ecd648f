"""Many devices and many processes: meshes, sharding, hosts, roll call, watchdog, preemption.

The watchdog notices a lost or hanging host, the roll call one that never arrives. What the processes
compute does not belong here.
"""
