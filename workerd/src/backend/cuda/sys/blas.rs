//! cuBLASLt: one plan for each kind of product, chosen by the library once.
#![expect(unsafe_code, reason = "a C library")]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::CUstream;

use super::{GpuError, Product};

/// Bytes the library may use on its way; what NVIDIA recommends for Hopper.
pub const WORKSPACE: usize = 32 << 20;

/// The library, on one device and stream.
#[derive(Debug)]
pub struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: u64,
    plans: Mutex<HashMap<Kind, Plan>>,
}

/// What a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Kind {
    m: u32,
    n: u32,
    k: u32,
    stride: u32,
    wide: bool,
}

#[derive(Clone, Copy, Debug)]
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    weights: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: the library's objects may be used by any thread; plans are behind a lock.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

fn failed(call: &'static str) -> impl Fn(result::CublasError) -> GpuError {
    move |error| GpuError::Call { call, reason: error.to_string() }
}

impl Blas {
    /// Whether the library is there.
    pub fn is_present() -> bool {
        // SAFETY: opens the library if there is one; nothing is called.
        unsafe { sys::is_culib_present() }
    }

    /// With so many bytes of device memory at `workspace` ([`WORKSPACE`]), which the caller keeps.
    ///
    /// # Errors
    /// What the library says.
    pub fn new(workspace: u64) -> Result<Self, GpuError> {
        let handle = result::create_handle().map_err(failed("cublasLtCreate"))?;
        Ok(Self { handle, workspace, plans: Mutex::new(HashMap::new()) })
    }

    /// # Safety
    /// See [`super::Gpu::multiply`]; `stream` is of the device of this handle.
    ///
    /// # Errors
    /// What the library says.
    pub unsafe fn multiply(&self, product: &Product, stream: CUstream) -> Result<(), GpuError> {
        let plan = self.plan(product)?;
        let (one, beta) = (1.0_f32, if product.add { 1.0_f32 } else { 0.0 });
        let pointer = |address: u64| address as *mut c_void;
        // SAFETY: the caller's memory, the plan's objects (which live as long as `self`), and our workspace.
        unsafe {
            result::matmul(
                self.handle,
                plan.operation,
                std::ptr::from_ref(&one).cast(),
                std::ptr::from_ref(&beta).cast(),
                pointer(product.weights),
                plan.weights,
                pointer(product.x),
                plan.x,
                pointer(product.out),
                plan.out,
                pointer(product.out),
                plan.out,
                &raw const plan.algorithm,
                pointer(self.workspace),
                WORKSPACE,
                stream.cast(),
            )
        }
        .map_err(failed("cublasLtMatmul"))
    }

    fn plan(&self, product: &Product) -> Result<Plan, GpuError> {
        let Product { m, n, k, stride, wide, .. } = *product;
        let kind = Kind { m, n, k, stride, wide };
        let mut plans = self.plans.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(plan) = plans.get(&kind) {
            return Ok(*plan);
        }
        let plan = self.make(&kind)?;
        plans.insert(kind, plan);
        Ok(plan)
    }

    /// The library counts by columns: a row-major `[rows][columns]` is its `columns x rows`.
    fn make(&self, kind: &Kind) -> Result<Plan, GpuError> {
        use sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA;
        use sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        use sys::cudaDataType_t::{CUDA_R_16BF, CUDA_R_32F};
        let layout = |kind, rows: u32, columns: u32, stride: u32| {
            result::create_matrix_layout(kind, rows.into(), columns.into(), stride.into())
                .map_err(failed("cublasLtMatrixLayoutCreate"))
        };
        let results = if kind.wide { CUDA_R_32F } else { CUDA_R_16BF };
        let operation = result::create_matmul_desc(CUBLAS_COMPUTE_32F, CUDA_R_32F)
            .map_err(failed("cublasLtMatmulDescCreate"))?;
        let weights = layout(CUDA_R_16BF, kind.k, kind.n, kind.k)?;
        let x = layout(CUDA_R_16BF, kind.k, kind.m, kind.k)?;
        let out = layout(results, kind.n, kind.m, kind.stride)?;
        let preference =
            result::create_matmul_pref().map_err(failed("cublasLtMatmulPreferenceCreate"))?;
        /// `CUBLAS_OP_T` of `cublasOperation_t`, a C enumeration.
        const TRANSPOSED: i32 = 1;
        // SAFETY: attributes get values of their own types; all objects were just made.
        let algorithm = unsafe {
            result::set_matmul_desc_attribute(
                operation,
                CUBLASLT_MATMUL_DESC_TRANSA,
                std::ptr::from_ref(&TRANSPOSED).cast(),
                size_of::<i32>(),
            )
            .map_err(failed("cublasLtMatmulDescSetAttribute"))?;
            result::set_matmul_pref_attribute(
                preference,
                CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                std::ptr::from_ref(&WORKSPACE).cast(),
                size_of::<usize>(),
            )
            .map_err(failed("cublasLtMatmulPreferenceSetAttribute"))?;
            let best = result::get_matmul_algo_heuristic(
                self.handle,
                operation,
                weights,
                x,
                out,
                out,
                preference,
            );
            let _ = result::destroy_matmul_pref(preference);
            best.map_err(failed("cublasLtMatmulAlgoGetHeuristic"))?.algo
        };
        Ok(Plan { operation, weights, x, out, algorithm })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        let plans = self.plans.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: objects of this handle, each destroyed once, the handle last.
        unsafe {
            for (_, plan) in plans.drain() {
                for layout in [plan.weights, plan.x, plan.out] {
                    let _ = result::destroy_matrix_layout(layout);
                }
                let _ = result::destroy_matmul_desc(plan.operation);
            }
            let _ = result::destroy_handle(self.handle);
        }
    }
}
