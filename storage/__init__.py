"""Object stores, tensor files, the version log and site liveness. minio and redis are imported here alone."""
