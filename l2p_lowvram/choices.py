"""What options may be, for the command line and the library; imports nothing, so that --help is quick."""

AUTO, DEQUANT, INT8 = "auto", "dequant", "int8"
COMPUTE_CHOICES = (AUTO, DEQUANT, INT8)
DTYPE_CHOICES = ("bf16", "fp16", "fp32")
IO_CHOICES = (AUTO, "read", "direct", "mmap")
