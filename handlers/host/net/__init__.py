"""Bridges, TAPs, nftables, conntrack, sysctls: netlink and libnftables."""
