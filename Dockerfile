# The `pocketfleet` command. The user's flows are mounted at /app/flows, see compose.yaml.
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /src
COPY requirements/build.txt requirements/build.txt
RUN python -m pip install --no-cache-dir --require-hashes -r requirements/build.txt
COPY pyproject.toml LICENSE README.md ./
COPY limiter limiter
COPY worker worker
COPY producer producer
COPY pocketfleet pocketfleet
RUN python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist .

FROM python:3.11-slim-bookworm
ENV PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
COPY requirements requirements
RUN python -m pip install --no-cache-dir --require-hashes -r requirements/runtime.txt
# What the flows import: a hashed lock of the user's own, put into requirements/ and named here.
ARG FLOW_REQUIREMENTS=""
RUN if [ -n "$FLOW_REQUIREMENTS" ]; then \
        python -m pip install --no-cache-dir --require-hashes -r "requirements/$FLOW_REQUIREMENTS"; \
    fi
COPY --from=wheel /dist /dist
RUN python -m pip install --no-cache-dir --no-deps --no-index /dist/*.whl
# A new volume takes its owner from the folder it covers.
RUN install -d -o 10001 -g 10001 -m 0700 /var/lib/pocketfleet && install -d /app/flows
USER 10001:10001
WORKDIR /app/flows
ENTRYPOINT ["pocketfleet"]
CMD ["--help"]
