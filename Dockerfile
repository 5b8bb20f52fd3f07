# syntax=docker/dockerfile:1
# Nightshift in a container, on a CPU: docker build -t nightshift .
# On a GPU machine: docker build --build-arg EXTRA=gpu -t nightshift . (and docker run --gpus all)

FROM python:3.11-slim-bookworm AS build
ARG EXTRA=cpu
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /app
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc=4:12.* libc6-dev=2.* make=4.* \
    && rm -rf /var/lib/apt/lists/*
# What changes seldom comes first: a change in our code does not install vLLM again.
COPY Makefile pyproject.toml constraints.txt constraints-gpu.txt README.md ./
RUN mkdir service trainer data && touch service/__init__.py trainer/__init__.py data/__init__.py \
    && make install EXTRA="${EXTRA}" PYTHON=python3
COPY service service
COPY trainer trainer
COPY data data

FROM python:3.11-slim-bookworm
ARG EXTRA=cpu
# libgomp and libnuma are what torch and vLLM load; on a GPU Triton compiles its kernels with gcc.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgomp1=12.* libnuma1=2.* \
    && if [ "${EXTRA}" = gpu ]; then \
        apt-get install --yes --no-install-recommends gcc=4:12.* libc6-dev=2.*; \
    fi \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 nightshift \
    && install --directory --owner nightshift /state
COPY --from=build /app /app
ENV PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/state/huggingface \
    NIGHTSHIFT_STATE=/state \
    NIGHTSHIFT_SERVER__HOST=0.0.0.0
USER 1000
WORKDIR /app
VOLUME /state
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "from data.http import open_directly; from data.settings import load_settings; open_directly(load_settings().server.url + '/readyz', timeout=4)"]
STOPSIGNAL SIGINT
# Keys are made with `docker compose exec nightshift nightshift keys create`: none belongs in a log.
CMD ["nightshift", "up", "--no-key"]
