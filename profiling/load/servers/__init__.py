"""Servers of Starling and of other runtimes under the same streams, for `starling.profiling.load.peer_servers`."""
