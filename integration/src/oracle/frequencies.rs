//! How fast each pair of a head turns, with a model's scaling: in f64, by each format's own rule.

use anyhow::{Context, Result};

use crate::weights::GgufFile;

fn plain(theta: f64, head_dim: usize) -> Vec<f64> {
    (0..head_dim / 2).map(|i| theta.powf(-(2.0 * i as f64) / head_dim as f64)).collect()
}

/// Of a GGUF file.
pub fn of_gguf(file: &GgufFile) -> Result<Vec<f64>> {
    let mut all = plain(file.float("rope.freq_base")?.into(), file.head_dim()?);
    let slower = f64::from(file.float("rope.scaling.factor").unwrap_or(1.0));
    all.iter_mut().for_each(|frequency| *frequency /= slower);
    if let Ok(factors) = file.matrix("rope_freqs.weight") {
        all.iter_mut().zip(&factors.values).for_each(|(f, factor)| *f /= f64::from(*factor));
    }
    Ok(all)
}

/// Of a `config.json`, as the classes that write it compute them: by wavelengths.
pub fn of_hf(config: &serde_json::Value, head_dim: usize) -> Result<Vec<f64>> {
    let theta = config["rope_theta"].as_f64().context("no `rope_theta`")?;
    let mut all = plain(theta, head_dim);
    let scaling = &config["rope_scaling"];
    let number = |key: &str| scaling[key].as_f64().with_context(|| format!("no `{key}`"));
    match scaling["rope_type"].as_str() {
        None => {}
        Some("linear") => {
            let factor = number("factor")?;
            all.iter_mut().for_each(|frequency| *frequency /= factor);
        }
        Some("llama3") => {
            let (factor, length) = (number("factor")?, number("original_max_position_embeddings")?);
            let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
            for frequency in &mut all {
                let wavelength = std::f64::consts::TAU / *frequency;
                if wavelength > length / low {
                    *frequency /= factor;
                } else if wavelength >= length / high {
                    let smooth = (length / wavelength - low) / (high - low);
                    *frequency = (1.0 - smooth) * *frequency / factor + smooth * *frequency;
                }
            }
        }
        Some(other) => anyhow::bail!("RoPE scaling `{other}` is not known here"),
    }
    Ok(all)
}
