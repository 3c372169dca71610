"""What an operator's `adopt` and `release` do: prove whose an instance is, or give it up."""
