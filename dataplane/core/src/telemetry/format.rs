//! How a log event becomes a line (facts ztunnel 12.5): text or JSON.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::layer::{Context, Layer};
use tracing_subscriber::registry::LookupSpan;

use super::access;
use super::settings::{Omitted, Settings};
use super::writer::LineWriter;

/// Our own modules are named without this in text, as upstream does with its crate.
const OWN_CRATE: &str = "underpass_core::";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Text,
    Json,
}

/// The layer that formats every event and hands it to the writer.
pub struct Lines {
    pub format: Format,
    pub writer: LineWriter,
    pub settings: Arc<Settings>,
}

/// A span's fields, rendered when it was made.
struct SpanFields(String);

/// Collects fields in their order.
struct Fields {
    format: Format,
    message: String,
    rest: String,
    /// Of the access log only.
    omitted: Option<Omitted>,
}

impl Format {
    /// The line that tells of lost ones, made by the writer itself.
    pub fn lost_lines(self) -> fn(u64) -> String {
        match self {
            Self::Text => |lines| lost_lines(Self::Text, lines),
            Self::Json => |lines| lost_lines(Self::Json, lines),
        }
    }

    fn line(
        self,
        level: &Level,
        target: &str,
        spans: &[(&'static str, String)],
        fields: &Fields,
    ) -> String {
        let mut time = String::with_capacity(512);
        if SystemTime.format_time(&mut Writer::new(&mut time)).is_err() {
            time.clear();
        }
        match self {
            Self::Text => text_line(time, level, target, spans, fields),
            Self::Json => json_line(&time, level, target, spans, fields),
        }
    }
}

fn lost_lines(format: Format, lines: u64) -> String {
    let mut fields = Fields::new(format);
    fields
        .message
        .push_str("log lines lost: their reader is too slow");
    fields.push("lines", lines);
    format.line(&Level::WARN, "underpass_core::telemetry", &[], &fields)
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Lines {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::new(self.format);
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(SpanFields(fields.rest));
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let mut extensions = span.extensions_mut();
        if let Some(SpanFields(text)) = extensions.get_mut::<SpanFields>() {
            let mut fields = Fields::new(self.format);
            fields.rest = std::mem::take(text);
            values.record(&mut fields);
            *text = fields.rest;
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let meta = event.metadata();
        let mut fields = Fields::new(self.format);
        if meta.target() == access::TARGET {
            fields.omitted = Some(self.settings.omitted());
        }
        event.record(&mut fields);
        let mut spans = Vec::new();
        for span in context.event_scope(event).into_iter().flatten() {
            if let Some(SpanFields(text)) = span.extensions().get::<SpanFields>() {
                spans.insert(0, (span.name(), text.clone()));
            }
        }
        let line = self
            .format
            .line(meta.level(), meta.target(), &spans, &fields);
        self.writer.line(line);
    }
}

fn text_line(
    time: String,
    level: &Level,
    target: &str,
    spans: &[(&'static str, String)],
    fields: &Fields,
) -> String {
    let mut line = time;
    line.push('\t');
    line.push_str(level_name(level));
    line.push('\t');
    line.push_str(target.strip_prefix(OWN_CRATE).unwrap_or(target));
    for (name, fields) in spans {
        line.push(':');
        line.push_str(name);
        line.push('{');
        line.push_str(fields);
        line.push('}');
    }
    line.push('\t');
    line.push_str(&fields.message);
    if !fields.rest.is_empty() {
        line.push('\t');
        line.push_str(&fields.rest);
    }
    line.push('\n');
    line
}

fn json_line(
    time: &str,
    level: &Level,
    target: &str,
    spans: &[(&'static str, String)],
    fields: &Fields,
) -> String {
    let mut line = String::with_capacity(512);
    line.push_str("{\"level\":\"");
    line.push_str(level_name(level));
    line.push_str("\",\"time\":\"");
    line.push_str(time);
    line.push_str("\",\"scope\":");
    push_json_text(&mut line, target);
    line.push_str(",\"message\":");
    push_json_text(&mut line, &fields.message);
    if !fields.rest.is_empty() {
        line.push(',');
        line.push_str(&fields.rest);
    }
    for (name, fields) in spans {
        line.push(',');
        push_json_text(&mut line, name);
        line.push_str(":{");
        line.push_str(fields);
        line.push('}');
    }
    line.push_str("}\n");
    line
}

fn level_name(level: &Level) -> &'static str {
    match *level {
        Level::ERROR => "error",
        Level::WARN => "warn",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

fn push_json_text(line: &mut String, text: &str) {
    // A text always has a JSON form.
    line.push_str(&serde_json::to_string(text).unwrap_or_default());
}

impl Fields {
    fn new(format: Format) -> Self {
        Self {
            format,
            message: String::new(),
            rest: String::new(),
            omitted: None,
        }
    }

    fn omits(&self, field: &Field) -> bool {
        let omitted = self.omitted.as_ref();
        omitted.is_some_and(|omitted| omitted.has(field.name()))
    }

    fn key(&mut self, name: &str) {
        match self.format {
            Format::Text => {
                if !self.rest.is_empty() {
                    self.rest.push(' ');
                }
                self.rest.push_str(name);
                self.rest.push('=');
            }
            Format::Json => {
                if !self.rest.is_empty() {
                    self.rest.push(',');
                }
                push_json_text(&mut self.rest, name);
                self.rest.push(':');
            }
        }
    }

    fn push(&mut self, name: &str, value: impl fmt::Display) {
        self.key(name);
        let _ = write!(self.rest, "{value}");
    }

    fn bare(&mut self, field: &Field, value: impl fmt::Display) {
        if !self.omits(field) {
            self.push(field.name(), value);
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            push_one_line(&mut self.message, self.format, value);
            return;
        }
        if self.omits(field) {
            return;
        }
        self.key(field.name());
        match self.format {
            Format::Text => {
                let _ = write!(self.rest, "{value:?}");
            }
            Format::Json => push_json_text(&mut self.rest, value),
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.bare(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.bare(field, value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.bare(field, value);
    }

    /// Also what `%value` arrives as: shown bare in text.
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            push_one_line(&mut self.message, self.format, &text);
            return;
        }
        if self.omits(field) {
            return;
        }
        self.key(field.name());
        match self.format {
            Format::Text => push_one_line(&mut self.rest, self.format, &text),
            Format::Json => push_json_text(&mut self.rest, &text),
        }
    }
}

/// A line is a line: whoever chose the text can't begin another. JSON escapes by itself.
fn push_one_line(into: &mut String, format: Format, text: &str) {
    if format == Format::Json || !text.contains(char::is_control) {
        into.push_str(text);
        return;
    }
    for character in text.chars() {
        if character.is_control() {
            into.extend(character.escape_default());
        } else {
            into.push(character);
        }
    }
}
