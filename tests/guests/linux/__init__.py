"""The Linux guest: the distribution's kernel with an agent of ours as its only process."""
