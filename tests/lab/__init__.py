"""The lab: a small Debian VM with true KVM and cgroup v2, where this machine's own KVM falls short.

QEMU emulates a processor with AMD's virtualization, so `kvm_amd` in the lab is the real thing.
"""
