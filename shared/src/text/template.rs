//! Chat templates: a conversation as the one text a model was trained on.
//!
//! Renders as Hugging Face's `apply_chat_template` does: the same whitespace rules, `raise_exception`,
//! `strftime_now`, `tojson` with Python's separators, Python's string and dict methods, `break` and `continue`.
//! The template is the model's, so the operator's; only values come from clients, and none of them is run.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::Serialize;
use serde_json::ser::Formatter;

use super::strftime::strftime;
use crate::wire::chat::ChatMessage;

const NAME: &str = "chat_template";

/// Why a conversation could not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model's template is no Jinja, or uses what is not known here.
    #[error("the model's chat template is malformed: {0}")]
    Malformed(String),
    /// The template refuses this conversation (`raise_exception`): the client's mistake.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// The template fails on this conversation.
    #[error("the model's chat template fails on these messages: {0}")]
    Failed(String),
}

/// A compiled template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

/// What one rendering is about.
#[derive(Clone, Copy, Debug, Default)]
pub struct Conversation<'a> {
    /// In order.
    pub messages: &'a [ChatMessage],
    /// Functions the model may call.
    pub tools: Option<&'a [serde_json::Value]>,
    /// Whether to end with the start of an answer.
    pub add_generation_prompt: bool,
    /// More variables; those above win.
    pub more: Option<&'a serde_json::Map<String, serde_json::Value>>,
}

impl ChatTemplate {
    /// Compiles `source`. The tokens' texts are variables of the template; empty where a model has none.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| TemplateError::Malformed(describe(&error)))?;
        Ok(Self { environment, bos_token: bos_token.to_owned(), eos_token: eos_token.to_owned() })
    }

    /// The prompt's text; `now` is what `strftime_now` tells, in UTC.
    pub fn render(
        &self,
        conversation: Conversation<'_>,
        now: SystemTime,
    ) -> Result<String, TemplateError> {
        let Conversation { messages, tools, add_generation_prompt, more } = conversation;
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| TemplateError::Malformed(describe(&error)))?;
        let since_epoch = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let strftime_now = move |format: String| {
            strftime(&format, since_epoch.as_secs())
                .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error))
        };
        let ours = context! {
            messages => messages,
            tools => tools,
            documents => None::<()>,
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos_token,
            eos_token => self.eos_token,
            strftime_now => Value::from_function(strftime_now),
        };
        let variables = match more {
            Some(more) => context! { ..ours, ..Value::from_serialize(more) },
            None => ours,
        };
        template.render(variables).map_err(|error| match refusal(&error) {
            Some(message) => TemplateError::Refused(message),
            None => TemplateError::Failed(describe(&error)),
        })
    }
}

/// What `raise_exception` was called with, wherever in the chain of causes it stands.
#[derive(Debug)]
struct Refusal(Arc<str>);

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Refusal(message.into())))
}

fn refusal(error: &minijinja::Error) -> Option<String> {
    let first: &(dyn std::error::Error + 'static) = error;
    std::iter::successors(Some(first), |error| error.source())
        .find_map(|error| error.downcast_ref::<Refusal>())
        .map(|refusal| refusal.0.to_string())
}

/// Message and line of the innermost error.
fn describe(error: &minijinja::Error) -> String {
    let text = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    match error.line() {
        Some(line) => format!("{text} (line {line})"),
        None => text,
    }
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`; the built-in filter would escape for HTML.
fn to_json(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let refuse = |error: &dyn std::fmt::Display| {
        minijinja::Error::new(ErrorKind::BadSerialization, error.to_string())
    };
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    if ensure_ascii == Some(true) {
        return Err(refuse(&"`tojson` with `ensure_ascii=True` is not available yet"));
    }
    options.assert_all_used()?;
    let mut bytes = Vec::new();
    let python = Python { indent, depth: 0, is_empty: true };
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, python);
    value.serialize(&mut serializer).map_err(|error| refuse(&error))?;
    String::from_utf8(bytes).map_err(|error| refuse(&error))
}

/// Writes JSON with Python's separators: `", "` and `": "`, or `","` and a line end where `indent` is set.
struct Python {
    indent: Option<usize>,
    depth: usize,
    is_empty: bool,
}

impl Python {
    fn break_line<W: std::io::Write + ?Sized>(&self, out: &mut W) -> std::io::Result<()> {
        match self.indent {
            Some(width) => write!(out, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }

    fn open(&mut self) {
        self.depth += 1;
        self.is_empty = true;
    }

    fn close<W: std::io::Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.depth -= 1;
        if self.is_empty { Ok(()) } else { self.break_line(out) }
    }

    fn separate<W: std::io::Write + ?Sized>(
        &self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        match (first, self.indent) {
            (true, _) => {}
            (false, Some(_)) => out.write_all(b",")?,
            (false, None) => out.write_all(b", ")?,
        }
        self.break_line(out)
    }
}

impl Formatter for Python {
    fn begin_array<W: std::io::Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.open();
        out.write_all(b"[")
    }

    fn end_array<W: std::io::Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.close(out)?;
        out.write_all(b"]")
    }

    fn begin_array_value<W>(&mut self, out: &mut W, first: bool) -> std::io::Result<()>
    where
        W: std::io::Write + ?Sized,
    {
        self.separate(out, first)
    }

    fn end_array_value<W: std::io::Write + ?Sized>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.is_empty = false;
        Ok(())
    }

    fn begin_object<W: std::io::Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.open();
        out.write_all(b"{")
    }

    fn end_object<W: std::io::Write + ?Sized>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.close(out)?;
        out.write_all(b"}")
    }

    fn begin_object_key<W>(&mut self, out: &mut W, first: bool) -> std::io::Result<()>
    where
        W: std::io::Write + ?Sized,
    {
        self.separate(out, first)
    }

    fn begin_object_value<W: std::io::Write + ?Sized>(
        &mut self,
        out: &mut W,
    ) -> std::io::Result<()> {
        out.write_all(b": ")
    }

    fn end_object_value<W: std::io::Write + ?Sized>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.is_empty = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn messages(json: serde_json::Value) -> Vec<ChatMessage> {
        serde_json::from_value(json).unwrap()
    }

    fn render_all(
        source: &str,
        messages: &[ChatMessage],
        more: Option<serde_json::Value>,
    ) -> Result<String, TemplateError> {
        let template = ChatTemplate::new(source, "<s>", "</s>")?;
        let more = more.map(|more| more.as_object().unwrap().clone());
        let conversation = Conversation {
            messages,
            tools: None,
            add_generation_prompt: true,
            more: more.as_ref(),
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_794_700_800);
        template.render(conversation, now)
    }

    fn render(source: &str, more: serde_json::Value) -> Result<String, TemplateError> {
        render_all(source, &messages(json!([{"role": "user", "content": "hi"}])), Some(more))
    }

    #[test]
    fn chatml_adds_its_system_text_unless_there_is_one() {
        let user = messages(json!([{"role": "user", "content": "hi"}]));
        assert_eq!(
            render_all(CHATML, &user, None).unwrap(),
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        );
        let both = messages(
            json!([{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]),
        );
        assert_eq!(
            render_all(CHATML, &both, None).unwrap(),
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn blocks_leave_no_whitespace_and_a_last_line_end_is_dropped() {
        let source = "a\n  {% if true %}\nb\n  {% endif %}\nc\n";
        assert_eq!(render(source, json!({})).unwrap(), "a\nb\nc");
    }

    #[test]
    fn json_is_written_as_python_does() {
        let x = json!({"x": {"a": [1, "<é>'\n", []], "b": {}, "c": 1.5}});
        assert_eq!(
            render("{{ x | tojson }}", x.clone()).unwrap(),
            r#"{"a": [1, "<é>'\n", []], "b": {}, "c": 1.5}"#
        );
        assert_eq!(
            render("{{ x | tojson(indent=2) }}", x).unwrap(),
            "{\n  \"a\": [\n    1,\n    \"<é>'\\n\",\n    []\n  ],\n  \"b\": {},\n  \"c\": 1.5\n}"
        );
    }

    #[test]
    fn pythons_methods_loop_controls_and_tokens_work() {
        let source = "{{ bos_token }}{% for m in messages %}{% if m.role.startswith('u') %}{{ m.content.strip().upper() }}{% break %}{% endif %}{% endfor %}{{ messages[0].get('name', 'none') }}{{ eos_token }}{% if tools is none %}.{% endif %}";
        assert_eq!(render(source, json!({})).unwrap(), "<s>HInone</s>.");
    }

    #[test]
    fn a_date_comes_from_the_callers_clock() {
        assert_eq!(render("{{ strftime_now('%d %b %Y') }}", json!({})).unwrap(), "15 Nov 2026");
        let error = render("{{ strftime_now('%Q') }}", json!({})).unwrap_err();
        assert!(error.to_string().contains("`%Q`"), "{error}");
    }

    #[test]
    fn a_clients_variables_do_not_replace_ours() {
        let source = "{{ messages[0].content }}{{ thinking }}{{ add_generation_prompt }}";
        let more = json!({"messages": [], "thinking": 1, "add_generation_prompt": false});
        assert_eq!(render(source, more).unwrap(), "hi1True");
    }

    #[test]
    fn values_are_never_run_as_templates() {
        let text = "{{ 7 * 7 }}{% raw %}";
        let user = messages(json!([{"role": "user", "content": text}]));
        assert_eq!(render_all("{{ messages[0].content }}", &user, None).unwrap(), text);
    }

    #[test]
    fn failures_say_whose_they_are() {
        let refused =
            render("{{ raise_exception('roles must alternate') }}", json!({})).unwrap_err();
        assert!(matches!(&refused, TemplateError::Refused(text) if text == "roles must alternate"));
        let nested = "{% macro m() %}{{ raise_exception('inside') }}{% endmacro %}{{ m() }}";
        let refused = render(nested, json!({})).unwrap_err();
        assert!(
            matches!(&refused, TemplateError::Refused(text) if text == "inside"),
            "{refused:?}"
        );
        let failed = render("\n{{ messages[0].content + 1 }}", json!({})).unwrap_err();
        assert!(
            matches!(&failed, TemplateError::Failed(text) if text.contains("line 2")),
            "{failed}"
        );
        let malformed = ChatTemplate::new("{% for %}", "", "").err().unwrap();
        assert!(malformed.to_string().contains("malformed"), "{malformed}");
    }
}
