"""What quantization cost: FID, CLIP score, paired similarity, speed and the report."""
