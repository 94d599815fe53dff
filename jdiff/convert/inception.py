"""InceptionV3 of the Fréchet distance, by the names of pytorch-fid's file, which are torchvision's."""

from jdiff.convert.rows import Row

TORCHVISION = (
    Row(r"stem/(\w+)/(conv|bn)", r"\1.\2"),
    Row(r"(Mixed_\w+)/(\w+)/(conv|bn)", r"\1.\2.\3"),
    Row(r"fc", r"fc"),
)
IGNORED = (
    (r".*\.num_batches_tracked", "how many batches the statistics are of"),
    (r"fc\.bias", "of the classes, which the Inception score takes without"),
    (r"AuxLogits\..*", "the auxiliary classifier, of training alone"),
)
