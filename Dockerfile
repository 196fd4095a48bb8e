# Runs dymo-med on the CPU: docker build -t dymo-med . && docker run --rm -v "$PWD:/data" dymo-med demo
FROM python:3.11-slim

WORKDIR /opt/dymo-med
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY cohorts cohorts
COPY dymo_med dymo_med
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu . -c constraints.txt \
    && useradd --create-home reader && mkdir /data && chown reader /data

# Not root, no network needed; results go to the folder that is mounted.
USER reader
WORKDIR /data
ENTRYPOINT ["dymo-med"]
CMD ["--help"]
