"""`hostd doctor`: what is wrong with this host, why it matters, and what to run."""
