"""What runs on the card's machine, a stage at a time, each in a process of its own."""

#: Of the folder that `pack` makes.
GRAPHS, KERNEL_LIBRARY, KIT_FILE = "graphs", "_library.so", "kit.json"
#: In its folder of graphs: what all bundles have in the same bytes, and where a bundle's weights lie in their file.
SHARED, LAYOUT = "shared", "weights.json"
