"""The protocol as documents: JSON Schema and AsyncAPI, generated from the types of the wire."""
