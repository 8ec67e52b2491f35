"""What to generate for: architectures and workloads, validated once at this door."""
