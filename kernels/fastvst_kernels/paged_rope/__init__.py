"""QKV bias, rotary embedding and the write into the KV cache, for the new token of each sequence."""
