"""The options of training: one file per method, with its verb (`VERB`); `common` and `online` are shared."""
