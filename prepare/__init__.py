"""Adapters: a raw download -> a clip store. One file a data set."""
