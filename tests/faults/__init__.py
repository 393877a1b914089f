"""Crashes, cut connections, damaged and full disks: what must hold then, counted. The table is in tests/faults.md."""
