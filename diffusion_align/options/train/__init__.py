"""The options of training: a file a method, which also declares its verb (`VERB`); `common` and `online` are shared."""
