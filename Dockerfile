# One image for the migration, the tracking server, the workers and both dashboards: they must agree on the versions in
# constraints.txt.
FROM python:3.11.14-slim-bookworm

# Passed on to pip, which reads it from the environment: an index with CPU builds of torch makes a much smaller image.
ARG PIP_EXTRA_INDEX_URL

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY workbench workbench
COPY dashboards dashboards
RUN --mount=type=cache,target=/root/.cache/pip pip install -c constraints.txt '.[server]'
COPY docker docker

# /data is where a volume is mounted; a new volume takes over its owner
RUN useradd --uid 1000 --create-home workbench && install -d -o workbench -g workbench /data
USER workbench
ENV WORKBENCH_HOME=/data HF_HOME=/data/huggingface PYTHONUNBUFFERED=1 MLFLOW_DISABLE_TELEMETRY=true
ENTRYPOINT ["/app/docker/entrypoint.sh"]
CMD ["workbench", "--help"]
