"""The bridge to transformers: the registered quantiser, loading, packed modules in place of dense ones."""
