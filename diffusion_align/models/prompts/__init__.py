"""What a text encoder reads of a prompt: length, weights of words, the layer of its states."""
