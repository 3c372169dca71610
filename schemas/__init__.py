"""The wire and the files shared with agentd: types, codec, subjects. No I/O."""
