"""nf_tables as an interface: nft's language, elements as messages, and who commits."""
