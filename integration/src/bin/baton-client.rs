//! `baton-client -c FILE -p PROMPTS`: sends all prompts of a file at once and keeps the answers in the order of the
//! prompts, with the options and files of TensorRT-LLM's `disagg_client.py`.
//!
//! A request that fails costs its own answer only: its place in the output is `null`, the reason goes to standard error.
//!
//! Exit codes: 0 all answered, 1 not ready or not all answered, 2 wrong usage, 78 a file that is not as it should be.

use std::fs::{File, OpenOptions};
use std::io::{Seek, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use baton_integration::at::At;
use baton_integration::cli::{Api, Client as Cli};
use baton_integration::client::Client;
use baton_router::config::RouterConfig;
use baton_shared::config::net::{HostPort, Listen};
use baton_shared::config::trtllm::DisaggConfig;
use baton_shared::config::{ConfigError, Document, EXIT_CODE, is_yaml};
use clap::Parser;
use futures_util::future::join_all;
use serde_json::{Value, json};

/// Between two looks at a server that is not ready.
const PAUSE: Duration = Duration::from_millis(250);
/// For one look.
const LOOK: Duration = Duration::from_secs(5);
/// For an answer, or a piece of a stream: longer than any router's deadline should be.
const PATIENCE: Duration = Duration::from_secs(3600);

fn main() -> ExitCode {
    let error = match run(&Cli::parse()) {
        Ok(code) => return code,
        Err(error) => error,
    };
    complain(&format!("{error:#}"));
    ExitCode::from(if error.is::<ConfigError>() { EXIT_CODE } else { 1 })
}

fn complain(text: &str) {
    // Standard error may be closed; the code says it too.
    let _ = writeln!(std::io::stderr(), "baton-client: {text}");
}

fn run(cli: &Cli) -> Result<ExitCode> {
    let server = match (&cli.server, &cli.disagg_config_file) {
        (Some(server), _) => server.clone(),
        (None, Some(file)) => address_in(file)?,
        (None, None) => bail!("`--disagg-config-file` or `--server` is needed"),
    };
    let prompts = prompts_in(&cli.prompts_file)?;
    let mut output = open(&cli.output_file)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let begun = Instant::now();
    let answers = runtime.block_on(async {
        let wait = Duration::from_secs(cli.server_start_timeout);
        let client = ready(&server, wait).await?.with_patience(PATIENCE);
        let model = model(&client).await?;
        anyhow::Ok(join_all(prompts.iter().map(|prompt| ask(cli, &client, &model, prompt))).await)
    })?;
    let failed = answers.iter().filter(|answer| answer.is_err()).count();
    let mut texts = Vec::with_capacity(answers.len());
    for (index, answer) in answers.into_iter().enumerate() {
        texts.push(match answer {
            Ok(text) => Value::String(text),
            Err(error) => {
                complain(&format!("prompt {index}: {error:#}"));
                Value::Null
            }
        });
    }
    let name = cli.output_file.display();
    write(&mut output, &texts).with_context(|| format!("{name}: cannot write"))?;
    let (answered, seconds) = (texts.len() - failed, begun.elapsed().as_secs_f64());
    // A reader that went away is no failure.
    let _ = writeln!(
        std::io::stdout(),
        "{answered} of {} prompts answered in {seconds:.1} s: {name}",
        texts.len()
    );
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Where a router with this configuration serves.
fn address_in(file: &Path) -> Result<Listen, ConfigError> {
    if is_yaml(file) {
        let DisaggConfig { hostname: host, port, .. } = DisaggConfig::read(file)?;
        return Ok(Listen::Tcp(HostPort { host, port }));
    }
    let document = Document::read_toml(file)?;
    let config: RouterConfig = document.parse()?;
    match config.server.listen {
        Listen::Inherited(_) => {
            let rule = "says nothing of the address: say it with `--server HOST:PORT`";
            Err(document.error("server.listen", rule))
        }
        listen => Ok(listen),
    }
}

/// The prompts of a JSON array.
fn prompts_in(file: &Path) -> Result<Vec<String>, ConfigError> {
    let refuse = |line: Option<usize>, rule: String| ConfigError {
        file: Some(file.to_owned()),
        line,
        ..ConfigError::new("", rule)
    };
    let text = std::fs::read_to_string(file)
        .map_err(|error| refuse(None, format!("cannot read this file: {error}")))?;
    let values: Vec<Value> = serde_json::from_str(&text).map_err(|error| {
        refuse(Some(error.line()), format!("must be a JSON array of prompts: {error}"))
    })?;
    if values.is_empty() {
        return Err(refuse(None, "holds no prompt".to_owned()));
    }
    let text = |(index, value): (usize, Value)| match value {
        Value::String(prompt) => Ok(prompt),
        other => Err(refuse(None, format!("prompt {index} is `{other}`, must be a string"))),
    };
    values.into_iter().enumerate().map(text).collect()
}

/// Opened before anything is sent: an answer that cannot be kept is not worth asking for. What it holds stays until then.
fn open(file: &Path) -> Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(file)
        .with_context(|| format!("{}: cannot write", file.display()))
}

fn write(output: &mut File, texts: &[Value]) -> Result<()> {
    output.set_len(0)?;
    output.rewind()?;
    output.write_all(serde_json::to_string_pretty(texts)?.as_bytes())?;
    output.write_all(b"\n")?;
    Ok(output.sync_all()?)
}

/// A client of the first of the server's addresses that answers as healthy, within `wait`.
async fn ready(server: &Listen, wait: Duration) -> Result<Client> {
    let end = Instant::now() + wait;
    loop {
        let mut last = anyhow!("it has no address");
        for at in addresses(server)? {
            let left = end.saturating_duration_since(Instant::now()).max(PAUSE);
            let client = Client::at(at).with_patience(LOOK.min(left));
            match client.get("/health").await {
                Ok(answer) if answer.status == 200 => return Ok(client),
                Ok(answer) => last = anyhow!("/health answers {}", answer.status),
                Err(error) => last = error,
            }
        }
        if Instant::now() >= end {
            return Err(last.context(format!("{server} is not ready after {} s", wait.as_secs())));
        }
        tokio::time::sleep(PAUSE).await;
    }
}

fn addresses(server: &Listen) -> Result<Vec<At>> {
    Ok(match server {
        Listen::Tcp(address) => {
            let mut all = address.resolve().with_context(|| format!("`{address}`"))?;
            for address in all.iter_mut().filter(|address| address.ip().is_unspecified()) {
                // Listening on all interfaces, it is reached by this machine's own.
                let v4 = address.is_ipv4();
                address.set_ip(if v4 {
                    [127, 0, 0, 1].into()
                } else {
                    [0, 0, 0, 0, 0, 0, 0, 1].into()
                });
            }
            all.into_iter().map(At::from).collect()
        }
        Listen::Unix(path) => vec![At::unix(path.clone())],
        Listen::Inherited(name) => bail!("`systemd:{name}` is no address"),
    })
}

/// The first model served.
async fn model(client: &Client) -> Result<String> {
    let models = client.get("/v1/models").await?.ok().context("/v1/models")?;
    let model = models["data"][0]["id"].as_str();
    Ok(model.with_context(|| format!("/v1/models names no model: {models}"))?.to_owned())
}

/// One answer's text.
async fn ask(cli: &Cli, client: &Client, model: &str, prompt: &str) -> Result<String> {
    let mut body = json!({
        "model": model, "max_tokens": cli.max_tokens, "temperature": cli.temperature,
        "ignore_eos": cli.ignore_eos, "stream": cli.streaming,
    });
    let (path, text) = match cli.endpoint {
        Api::Completions => {
            body["prompt"] = json!(prompt);
            ("/v1/completions", "/choices/0/text")
        }
        Api::Chat => {
            body["messages"] = json!([
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": prompt},
            ]);
            ("/v1/chat/completions", "/choices/0/message/content")
        }
    };
    if cli.streaming {
        return stream(client, path, &body).await;
    }
    let answer = client.post(path, &body).await?.ok()?;
    let text = answer.pointer(text).and_then(Value::as_str);
    Ok(text.with_context(|| format!("an answer without a text: {answer}"))?.to_owned())
}

/// The same, put together from a stream.
async fn stream(client: &Client, path: &str, body: &Value) -> Result<String> {
    let mut stream = client.stream(path, body).await?;
    if stream.status != 200 {
        stream.whole().await?.ok()?;
        bail!("an answer that is neither a stream nor an error");
    }
    let mut text = String::new();
    while let Some(event) = stream.event().await? {
        if event == "[DONE]" {
            return Ok(text);
        }
        let chunk: Value = serde_json::from_str(&event).with_context(|| event.clone())?;
        ensure!(!chunk["error"].is_object(), "the answer broke off: {}", chunk["error"]);
        let choice = &chunk["choices"][0];
        let piece = choice["text"].as_str().or_else(|| choice["delta"]["content"].as_str());
        text.push_str(piece.unwrap_or_default());
    }
    bail!("the answer ended without [DONE]")
}
