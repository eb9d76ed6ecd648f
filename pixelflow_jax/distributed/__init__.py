"""Many devices and many processes: meshes, sharding, hosts, roll call, watchdog, preemption.

This is where a lost or hanging host is noticed. What the processes compute does not belong here.
"""
