"""Excerpts of what RCCL and NCCL write with NCCL_DEBUG=INFO, in the formats of public logs."""

# LUMI, Frontier: aws-ofi-rccl over Slingshot.
PLUGIN = """\
nid005072:71212:71212 [0] NCCL INFO Bootstrap : Using hsn0:10.253.5.12<0>
nid005072:71212:71212 [0] NCCL INFO NET/Plugin : Plugin load (librccl-net.so) returned 0
nid005072:71212:71212 [0] NCCL INFO NET/Plugin: Loaded net plugin AWS Libfabric (v5)
nid005072:71212:71306 [0] NCCL INFO NET/OFI Using aws-ofi-rccl 1.4.0
nid005072:71212:71306 [0] NCCL INFO NET/OFI Selected Provider is cxi
nid005072:71212:71306 [0] NCCL INFO Using network AWS Libfabric
nid005072:71212:71306 [0] NCCL INFO Channel 00/0 : 7[7] -> 8[0] [receive] via NET/AWS Libfabric/0/GDRDMA
nid005072:71212:71306 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[1] via P2P/IPC
"""

# A newer plugin, with different wording, without GPU-direct RDMA.
NEWER = """\
nid001021:1201:1288 [3] NCCL INFO NET/OFI Initializing aws-ofi-nccl 1.19.2
nid001021:1201:1288 [3] NCCL INFO NET/OFI Selected provider is cxi, fabric is cxi (found 4 nics)
nid001021:1201:1288 [3] NCCL INFO Successfully loaded external network plugin librccl-net.so
nid001021:1201:1288 [3] NCCL INFO Assigned NET plugin AWS Libfabric to comm
nid001021:1201:1301 [3] NCCL INFO Channel 02/0 : 3[3] -> 11[3] [send] via NET/AWS Libfabric/2
"""

# The plugin is not on LD_LIBRARY_PATH.
SOCKETS = """\
nid005073:9001:9001 [0] NCCL INFO Bootstrap : Using hsn0:10.253.5.13<0>
nid005073:9001:9001 [0] NCCL INFO NET/Plugin : No plugin found (librccl-net.so), using internal implementation
nid005073:9001:9088 [0] NCCL INFO NET/IB : No device found.
nid005073:9001:9088 [0] NCCL INFO NET/Socket : Using [0]hsn0:10.253.5.13<0> [1]hsn1:10.253.5.14<0>
nid005073:9001:9088 [0] NCCL INFO Using network Socket
nid005073:9001:9088 [0] NCCL INFO Channel 00/0 : 7[7] -> 8[0] [receive] via NET/Socket/0
"""

# The plugin is present, libfabric's provider for Slingshot is missing.
TCP_PROVIDER = """\
nid005073:9001:9088 [0] NCCL INFO NET/OFI Selected Provider is tcp;ofi_rxm
nid005073:9001:9088 [0] NCCL INFO Using network AWS Libfabric
"""

# InfiniBand in NCCL itself: no plugin, and no problem.
INFINIBAND = """\
node2:22555:22555 [0] NCCL INFO NET/Plugin : No plugin found (libnccl-net.so), using internal implementation
node2:22555:22601 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB ib0:10.10.7.109<0>
node2:22555:22601 [0] NCCL INFO Using network IB
node2:22555:22601 [0] NCCL INFO Channel 00/0 : 8[0] -> 0[0] [send] via NET/IB/0/GDRDMA
"""

# Before 2.5, NCCL named its network only when it found it.
OLD_SOCKETS = """\
ip-172-31-0-11:45384:45384 [0] NCCL INFO NET/Plugin : No plugin found (libnccl-net.so).
ip-172-31-0-11:45384:45384 [0] NCCL INFO NET/IB : No device found.
ip-172-31-0-11:45384:45384 [0] NCCL INFO NET/Socket : Using [0]ens3:172.31.0.11<0>
"""

# The plugin is announced, but the channels show that sockets are used.
ANNOUNCED_ONLY = """\
nid001:1:2 [0] NCCL INFO NET/Plugin: Loaded net plugin AWS Libfabric (v8)
nid001:1:2 [0] NCCL INFO Using network AWS Libfabric
nid001:1:2 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/Socket/0
"""

ONE_NODE = """\
node1:77:77 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
"""
